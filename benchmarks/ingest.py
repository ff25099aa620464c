"""Ingest and join of synthetic events: rows per second, and peak memory of all processes.

.venv/bin/python benchmarks/ingest.py [--quick] [--json FILE]
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from environment import PeakMemory, describe

from pipeline.config import Recipe
from pipeline.days import available_days
from pipeline.marketplace.synthetic import generate
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join

ROOT = Path(__file__).parents[1]
NUM_DAYS = 5
OBJECT_STORE_BYTES = 512 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the events, ingest and join them, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 million events, not 10 million")
    parser.add_argument("--events", type=int, help="number of events")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that Ray may use")
    parser.add_argument(
        "--dir", type=Path, help="where the data goes (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    num_events = args.events or (1_000_000 if args.quick else 10_000_000)
    folder = Path(tempfile.mkdtemp(prefix="ingest-", dir=args.dir))
    try:
        figures = measure(num_events, args.cpus, folder)
    finally:
        shutil.rmtree(folder)
    for name, figure in figures.items():
        print(
            f"{name:<28}{figure:>14,.2f}"
            if isinstance(figure, float)
            else f"{name:<28}{figure:>14,}"
        )
    if args.json:
        args.json.write_text(json.dumps({**describe(), **figures}, indent=2))
    return 0


def measure(num_events: int, num_cpus: int, folder: Path) -> dict[str, Any]:
    """Figures of one run in `folder`."""
    recipe = _recipe(num_events, folder / "data")
    synthetic = recipe.data.synthetic
    assert synthetic is not None
    generate_s, _ = _timed(lambda: generate(synthetic, recipe.data.root))
    for name in ("ingest", "join"):
        (folder / name).mkdir()
    days = available_days(recipe.data.root)
    with PeakMemory() as memory:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            _node_ip_address="127.0.0.2",
        )
        try:
            ingest_s, facts = _timed(
                lambda: ingest(recipe, check_span(recipe, days, None), folder / "ingest")
            )
            ingest_peak_gib = memory.peak_gib
            join_s, joined = _timed(lambda: join(recipe, folder / "ingest", folder / "join"))
        finally:
            ray.shutdown()
    return {
        "rows": facts.rows_out,
        "cpus": num_cpus,
        "num_buckets": facts.num_buckets,
        "mean_history_length": next(iter(facts.mean_history_length.values())),
        "generate_s": generate_s,
        "ingest_s": ingest_s,
        "rows_per_s": facts.rows_in / ingest_s,
        "peak_rss_gib": ingest_peak_gib,
        "join_s": join_s,
        "join_rows_per_s": joined.rows / join_s,
        "peak_rss_with_join_gib": memory.peak_gib,
    }


def _recipe(num_events: int, root: Path) -> Recipe:
    """The demo's features on a marketplace with 50 events a user."""
    recipe = yaml.safe_load((ROOT / "pipeline" / "recipes" / "demo.yaml").read_text())
    recipe["data"]["root"] = root
    recipe["data"]["synthetic"] |= {
        "num_days": NUM_DAYS,
        "events_per_day": num_events // NUM_DAYS,
        "num_users": max(num_events // 50, 100),
        "num_items": max(num_events // 1_000, 100),
        "image_size": 8,
    }
    return Recipe.model_validate(recipe)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    sys.exit(main())

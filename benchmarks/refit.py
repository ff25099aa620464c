"""Semantic codes over days with births: new items, and what a refit of the codebooks costs.

The synthetic marketplace is run day after day, every model warm-started from the one before:

    ids     no codes
    codes   codebooks fitted on the first day and frozen
    refit   fitted anew in the middle; code numbers and table rows are carried over
    lost    the same, but numbered anew (`keep_meaning: false`), so that code tables start afresh

`codes`, `refit` and `lost` share the days before the refit. Item vectors are a column of the
catalogue made here from the items' texts (TF-IDF, 32 principal directions). Every model is
evaluated on the day behind its own; new items are those that no event has shown before.

Run: .venv/bin/python benchmarks/refit.py [--quick] [--seeds N] [--json FILE] [--work DIR]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from environment import describe
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from deploy.app import main as braid
from pipeline.config import SyntheticConfig
from pipeline.marketplace.synthetic import generate
from pipeline.recipe import load_recipe

DIM = 32
FIRST_RUN = 2
"""Index of the first day that is run: the first model trains on three days."""
BIRTHS_PER_DAY = 0.15
"""Of the living items: enough new ones a day to tell models apart."""
CODES = (
    "{vectors: {kind: column}, rq: {num_levels: 3, codebook_size: 32}, "
    "vq: {top_k: 10, max_items: 8000}}"
)


def text_vectors(texts: list[str]) -> np.ndarray:
    """Unit vectors from words: TF-IDF and its principal directions."""
    words: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for word in text.lower().split():
            rows.append(row)
            columns.append(words.setdefault(word.strip(".,"), len(words)))
    counts = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(texts), len(words)))
    counts.sum_duplicates()
    frequency = np.bincount(counts.indices, minlength=len(words))
    counts.data *= np.log(len(texts) / np.maximum(frequency, 1))[counts.indices]
    left, values, _ = svds(counts, k=DIM, random_state=0)
    vectors = left * values
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    return vectors.astype(np.float32)


def make_data(root: Path, config: SyntheticConfig) -> None:
    """The marketplace, with item vectors in its catalogue."""
    generate(config, root)
    items = pq.read_table(root / "items.parquet")
    if "vector" not in items.column_names:
        vectors = text_vectors(items["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
        pq.write_table(items.append_column("vector", column), root / "items.parquet")


class Bench:
    """One seed: all variants over all days."""

    def __init__(self, work: Path, overrides: list[str], seed: int, days: list[str]) -> None:
        self.work, self.days = work, days
        self.overrides = [*overrides, f"ranking.trainer.seed={seed}"]
        self.refit_day = days[len(days) // 2]

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Summaries of every variant, day by day."""
        with_codes = [f"codes={CODES}"]
        forced = [*with_codes, f"codes.refit.force_on=[{self.refit_day}]"]
        before = [day for day in self.days if day < self.refit_day]
        self._backfill("ids", self.days, ["codes=null"])
        self._backfill("codes", before, with_codes)
        for name in ("refit", "lost"):
            shutil.copytree(self.work / "codes", self.work / name, dirs_exist_ok=True)
        after = [day for day in self.days if day >= self.refit_day]
        self._backfill("codes", after, with_codes)
        self._backfill("refit", after, forced)
        self._backfill("lost", after, [*forced, "codes.refit.keep_meaning=false"])
        return {name: self._summaries(name) for name in ("ids", "codes", "refit", "lost")}

    def _backfill(self, name: str, days: list[str], changes: list[str]) -> None:
        sets = [part for o in (*self.overrides, *changes) for part in ("--set", o)]
        span = ["--from", days[0], "--to", days[-1]]
        code = braid(["backfill", "--recipe", "demo", *span, "--out", str(self.work / name), *sets])
        assert code == 0, (name, code)

    def _summaries(self, name: str) -> list[dict[str, Any]]:
        found = []
        for day in self.days:
            summary = json.loads((self.work / name / day / "summary.json").read_text())
            click = summary["eval"]["click"]
            quantized = self.work / name / day / "quantize" / "manifest.json"
            facts = json.loads(quantized.read_text())["facts"] if quantized.exists() else {}
            found.append(
                {
                    "day": day,
                    "auc": click["auc"],
                    "new_items_auc": click["slices"]["cold"]["auc"],
                    "new_items_rows": click["slices"]["cold"]["num_rows"],
                    "logloss": click["logloss"],
                    "version": facts.get("version"),
                    "stability": (facts.get("stability") or {}).get("full"),
                }
            )
        return found


def mean_of(runs: list[dict[str, list[dict[str, Any]]]], name: str, key: str) -> np.ndarray:
    """Figures (seeds, days) of one variant."""
    return np.array([[day[key] for day in run[name]] for run in runs], float)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half the events")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, help="keep data and runs here")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    config = load_recipe("demo").data.synthetic
    assert config is not None
    config = config.model_copy(
        update={
            "num_days": 9,
            "events_per_day": 10_000 if args.quick else 20_000,
            "births_per_day": BIRTHS_PER_DAY,
        }
    )
    make_data(work / "data", config)
    overrides = [f"data.root={work / 'data'}", "data.synthetic=null", "cluster.num_workers=1"]
    overrides += ["gate.max_auc_drop=null", "gate.min_auc=0.5", "gate.calibration=[0.2, 5.0]"]
    days = sorted(p.name.removeprefix("dt=") for p in (work / "data" / "events").iterdir())
    days = days[FIRST_RUN:-1]
    runs = [Bench(work / f"seed-{s}", overrides, s, days).run() for s in range(args.seeds)]
    figures = summarise(runs, days)
    if args.json:
        args.json.write_text(json.dumps({**figures, "runs": runs, **describe()}, indent=2))


def summarise(runs: list[dict[str, list[dict[str, Any]]]], days: list[str]) -> dict[str, Any]:
    """Print the table; the figures that matter, means over seeds."""
    names = ("ids", "codes", "refit", "lost")
    table = Table(title=f"AUC by day (new items), mean of {len(runs)} seeds")
    for column in ("trained up to", *names):
        table.add_column(column, justify="right")
    auc = {name: mean_of(runs, name, "auc").mean(0) for name in names}
    new = {name: mean_of(runs, name, "new_items_auc").mean(0) for name in names}
    for i, day in enumerate(days):
        mark = " refit" if i == len(days) // 2 else ""
        cells = [f"{auc[name][i]:.4f} ({new[name][i]:.4f})" for name in names]
        table.add_row(day + mark, *cells)
    Console().print(table)
    middle = len(days) // 2
    return {
        "days": days,
        "refit_day": days[middle],
        "new_items_gain": (new["codes"] - new["ids"]).tolist(),
        "refit_day_loss": float(auc["codes"][middle] - auc["refit"][middle]),
        "lost_day_loss": float(auc["codes"][middle] - auc["lost"][middle]),
        "auc": {name: values.tolist() for name, values in auc.items()},
        "new_items_auc": {name: values.tolist() for name, values in new.items()},
    }


if __name__ == "__main__":
    main()

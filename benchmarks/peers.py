"""Training throughput and AUC beside FuxiCTR: same models, Parquet data, batch size and threads.

Run: .venv/bin/python benchmarks/peers.py --fuxictr-python PYTHON --fuxictr-models DIR
         [--quick] [--compiled] [--only PART] [--json FILE]

PYTHON is the interpreter of an environment with fuxictr 2.3.10, DIR the `model_zoo` of a checkout
of its repository (docs/peers.md says how to get both). Runs of the two sides alternate; figures are
medians; each table is printed, and FILE written, as soon as its runs are done. Both train from the
same Parquet file through their own loaders; the row "bare" is FuxiCTR with batches that lie ready
before the clock starts, and without the clipping of all gradients that its training step always
does (Braid clips nothing here). It trains in fp32 with Adam on dense gradients, Braid with row-wise
Adagrad fused into the backward pass.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import workload
from environment import describe
from peers_braid import schema
from rich.console import Console
from rich.table import Table

from embedding.memory import WORKER_ENVIRONMENT
from embedding.precision import cpu_has_bf16
from embedding.samples import KEYS

THREADS = 2
NUM_TABLES = workload.NUM_SPARSE
ROWS_PER_TABLE = [workload.ROWS_PER_TABLE] * NUM_TABLES
NUM_LARGE_TABLES = 3
LARGE_TABLE_ROWS = (100_000, 1_000_000, 10_000_000)
GROWTH = "growth"
STEPS = {"deepfm": 12, "dcnv2": 12, "fgcnn": 5}
GEMM_SIZE = 2048
PEER, BARE = "fuxictr", "fuxictr, bare"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    train_rows: int
    test_rows: int
    with_auc: bool


class Worker:
    """A side in a process of its own; it idles between commands."""

    def __init__(
        self, command: list[str], job: dict[str, Any], environment: dict[str, str]
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 # closed in __exit__
        self._process = subprocess.Popen(
            [*command, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment | {"OMP_NUM_THREADS": str(THREADS)},
        )

    def ask(self, **command: Any) -> dict[str, float]:
        """The answer to one command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(
                f"{self._process.args!r} ended with {code}:\n{self._errors.read()[-2000:]}"
            )
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()


@dataclass(frozen=True)
class Sides:
    """Where the two programs and their data are."""

    fuxictr_python: Path
    fuxictr_models: Path
    folder: Path
    train: str = "train.parquet"
    """Name of the file to train from."""

    def fuxictr(self, model: str, rows_per_table: list[int], *, bare: bool = False) -> Worker:
        """The peer."""
        job = self._job(model, rows_per_table) | {
            "bare": bare,
            "models": str(self.fuxictr_models),
            "scratch": str(self.folder / "scratch"),
        }
        script = Path(__file__).with_name("peers_fuxictr.py")
        return Worker([str(self.fuxictr_python), str(script)], job, {})

    def braid(self, model: str, rows_per_table: list[int], side: str, port: int) -> Worker:
        """Ours: a precision, and `compiled` behind it or not."""
        precision, *compiled = side.split()
        job = self._job(model, rows_per_table)
        job |= {"precision": precision, "compiled": bool(compiled), "port": port}
        script = Path(__file__).with_name("peers_braid.py")
        return Worker([sys.executable, str(script)], job, WORKER_ENVIRONMENT)

    def _job(self, model: str, rows_per_table: list[int]) -> dict[str, Any]:
        return {
            "model": model,
            "rows_per_table": rows_per_table,
            "train": str(self.folder / self.train),
            "test": str(self.folder / "test.parquet"),
            "batch_size": workload.BATCH_SIZE,
            "threads": THREADS,
        }


def write_data(path: Path, rows_per_table: list[int], num_rows: int, seed: int) -> None:
    """Ids of all tables, and a label: its log-odds add effects of ids and products of some of them.

    Ids of a table of the usual size are skewed. Those of a larger one are uniform over all of its
    rows, so that next to every look-up of a batch touches a row of its own, which no cache holds:
    the hardest case for an optimizer that touches the rows of the batch only. Effects repeat along
    such a table.
    """
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(7)
    rows = workload.ROWS_PER_TABLE
    effects = truth.normal(0, 0.35, (NUM_TABLES, rows))
    tastes = truth.normal(0, 0.6, (6, rows, 4))
    ids = np.minimum(rng.pareto(0.9, (NUM_TABLES, num_rows)) * 8, rows - 1).astype(np.int64)
    for i, size in enumerate(rows_per_table):
        if size > rows:
            ids[i] = rng.integers(0, size, num_rows)
    kinds = ids % rows
    log_odds = sum(effects[i][kinds[i]] for i in range(NUM_TABLES)) - 1.0
    for a, b in ((0, 1), (2, 3), (4, 5)):
        log_odds = log_odds + (tastes[a][kinds[a]] * tastes[b][kinds[b]]).sum(axis=1)
    labels = rng.random(num_rows) < 1 / (1 + np.exp(-log_odds))
    columns: dict[str, Any] = {f"key:{key}": np.arange(num_rows) for key in KEYS}
    columns["label:click"] = labels.astype(np.float32)
    columns |= {f"sparse:s{i}": ids[i] for i in range(NUM_TABLES)}
    pq.write_table(pa.table(columns), path, row_group_size=workload.ROW_GROUP_ROWS)


def compare(sides: Sides, model: str, plan: Plan, *, compiled: bool) -> dict[str, Any]:
    """Alternating rounds of one model; the AUC of an epoch at the end."""
    precisions = ["fp32", *(["bf16"] if cpu_has_bf16() else [])]
    ours = [*precisions, *(f"{name} compiled" for name in precisions if compiled)]
    rates: dict[str, list[float]] = {name: [] for name in (PEER, BARE, *ours)}
    gemms: dict[str, list[float]] = {name: [] for name in precisions}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(sides.fuxictr(model, ROWS_PER_TABLE, bare=name == BARE))
            for name in (PEER, BARE)
        }
        for port, name in enumerate(ours, start=29_801):
            workers[name] = stack.enter_context(sides.braid(model, ROWS_PER_TABLE, name, port))
        for worker in workers.values():
            worker.ask(steps=2)
        for _ in range(plan.rounds):
            for name, worker in workers.items():
                rates[name].append(worker.ask(steps=STEPS[model])["rows_per_s"])
            for name in precisions:
                gemms[name].append(gemm_gflop_per_s(name))
        quality = {}
        if plan.with_auc:
            quality = {
                name: worker.ask(epoch=True) for name, worker in workers.items() if name != BARE
            }
    flop = workload.gemm_flop_per_row(model, schema(ROWS_PER_TABLE))
    peer, bare = (statistics.median(rates[name]) for name in (PEER, BARE))
    figures: dict[str, Any] = {
        PEER: {"rows_per_s": peer, **quality.get(PEER, {})},
        BARE: {"rows_per_s": bare},
    }
    for name in ours:
        rate, gemm = statistics.median(rates[name]), statistics.median(gemms[name.split()[0]])
        figures[name] = {
            "rows_per_s": rate,
            "ratio": rate / peer,
            "ratio_to_bare": rate / bare,
            "share_of_gemm_limit": rate * flop / (gemm * 1e9),
            "gemm_gflop_per_s": gemm,
            **quality.get(name, {}),
        }
    return figures


def growth(sides: Sides, plan: Plan) -> dict[str, dict[str, float]]:
    """DeepFM with some tables grown: rows/s of both sides by rows of a large table.

    The peer is bare: neither its loader nor its clipping, which reads and scales the gradients of
    all rows, is part of what grows.
    """
    found = {}
    for rows in LARGE_TABLE_ROWS:
        tables = [rows] * NUM_LARGE_TABLES + ROWS_PER_TABLE[NUM_LARGE_TABLES:]
        grown = replace(sides, train=f"train-{rows}.parquet")
        write_data(sides.folder / grown.train, tables, plan.train_rows, seed=1)
        rates: dict[str, list[float]] = {BARE: [], "fp32": []}
        with (
            grown.fuxictr("deepfm", tables, bare=True) as theirs,
            grown.braid("deepfm", tables, "fp32", 29_811) as ours,
        ):
            workers = {BARE: theirs, "fp32": ours}
            for worker in workers.values():
                worker.ask(steps=1)
            for _ in range(plan.rounds):
                for name, worker in workers.items():
                    steps = 3 if name == BARE and rows > 10**6 else STEPS["deepfm"]
                    rates[name].append(worker.ask(steps=steps)["rows_per_s"])
        medians = {name: statistics.median(values) for name, values in rates.items()}
        found[str(rows)] = medians | {"ratio": medians["fp32"] / medians[BARE]}
    return found


def gemm_gflop_per_s(precision: str) -> float:
    """Rate of a large matrix product in this process."""
    torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    _ = a @ b
    started = time.perf_counter()
    for _ in range(3):
        _ = a @ b
    return 3 * 2 * GEMM_SIZE**3 / (time.perf_counter() - started) / 1e9


def missing_peer(python: Path | None, models: Path | None) -> str | None:
    """What of FuxiCTR is not there, as a sentence; None: nothing."""
    for option, path in (("--fuxictr-python", python), ("--fuxictr-models", models)):
        if path is None or not path.exists():
            found = "is not given" if path is None else f"{path} does not exist"
            return (
                f"{option} {found}; the comparison runs FuxiCTR beside Braid, from an environment "
                "with fuxictr 2.3.10 (--fuxictr-python PYTHON) and the model_zoo of its repository "
                "(--fuxictr-models DIR): docs/peers.md has the commands that get both"
            )
    return None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuxictr-python", type=Path, help="interpreter with fuxictr 2.3.10")
    parser.add_argument("--fuxictr-models", type=Path, help="model_zoo of a checkout of FuxiCTR")
    parser.add_argument("--quick", action="store_true", help="throughput only, under five minutes")
    parser.add_argument(
        "--compiled", action="store_true", help="also with ranking.model.compile; needs g++"
    )
    parser.add_argument(
        "--only", choices=(*STEPS, GROWTH), action="append", help="a part of the comparison"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    missing = missing_peer(args.fuxictr_python, args.fuxictr_models)
    if missing is not None:
        parser.exit(2, f"error: {missing}\n")
    plan = Plan(2, 98_304, 1, with_auc=False) if args.quick else Plan(5, 262_144, 65_536, True)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "train.parquet", ROWS_PER_TABLE, plan.train_rows, seed=1)
        write_data(Path(folder) / "test.parquet", ROWS_PER_TABLE, plan.test_rows, seed=2)
        sides = Sides(args.fuxictr_python, args.fuxictr_models, Path(folder))
        parts = args.only or [*STEPS, *([] if args.quick else [GROWTH])]
        figures: dict[str, Any] = {}
        for part in (*STEPS, GROWTH):
            if part not in parts:
                continue
            if part == GROWTH:
                figures[part] = growth(sides, plan)
                table = _growth_table(figures[part])
            else:
                figures[part] = compare(sides, part, plan, compiled=args.compiled)
                table = _table(part, figures[part])
            Console().print(table)
            if args.json:
                args.json.write_text(json.dumps({**figures, **describe()}, indent=2))


def _table(model: str, figures: dict[str, Any]) -> Table:
    title = f"{model}: 26 tables, 0.9 M rows, D 16, batch 4096, 2 threads"
    names = ("side", "rows/s", "ratio", "ratio to bare", "of GEMM limit", "AUC, 1 epoch, 1 seed")
    table = Table(*names, title=title)
    for side, row in figures.items():
        table.add_row(
            side,
            f"{row['rows_per_s']:,.0f}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['ratio_to_bare']:.2f}" if "ratio" in row else "",
            f"{row['share_of_gemm_limit']:.0%}" if "ratio" in row else "",
            f"{row['auc']:.4f}" if "auc" in row else "",
        )
    return table


def _growth_table(figures: dict[str, Any]) -> Table:
    title = f"deepfm, {NUM_LARGE_TABLES} of 26 tables grown; their ids uniform over all rows"
    table = Table("rows each", BARE, "fp32", "ratio", title=title)
    for rows, row in figures.items():
        rates = (f"{row[name]:,.0f}" for name in (BARE, "fp32"))
        table.add_row(f"{int(rows):,}", *rates, f"{row['ratio']:.2f}")
    return table


if __name__ == "__main__":
    main()

"""Training throughput of three models on the CPU, next to what the machine's GEMM allows.

Run: .venv/bin/python benchmarks/training.py [--quick] [--json FILE]

Every figure comes from processes of its own. `share_of_gemm_limit` divides by the rows/s at which
the model's matrix products alone would run at the GEMM rate measured between the windows.
`communication_share` compares two ranks of one group with two processes that train alone at the
same time, so that both share the machine alike.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import workload
from environment import describe
from rich.console import Console
from rich.table import Table

from embedding.batch import RankingBatch
from embedding.memory import WORKER_ENVIRONMENT, keep_freed_memory
from embedding.precision import cpu_has_bf16

NUM_BATCHES = 8
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Job:
    """One measurement; `num_groups` groups of `world_size` ranks run at the same time."""

    world_size: int
    num_groups: int
    threads_per_rank: int
    windows: int
    model: str = "deepfm"
    precision: str = "fp32"


@dataclass(frozen=True)
class Figures:
    """Medians over windows of `NUM_BATCHES` steps."""

    rows_per_s: float
    """Of one group."""
    gemm_gflop_per_s: float
    """Per rank."""

    def share_of_gemm_limit(self, flop_per_row: float) -> float:
        """Rows/s over what the products alone would allow; for one rank."""
        return self.rows_per_s * flop_per_row / (self.gemm_gflop_per_s * 1e9)


def measure(job: Job) -> Figures:
    """Run a job in processes of its own; the mean over its groups."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    num_processes = job.world_size * job.num_groups
    barrier = context.Barrier(num_processes)
    workers = mp.spawn(_worker, (job, barrier, results), nprocs=num_processes, join=False)
    while not workers.join():
        pass
    found: list[Figures] = [results.get() for _ in range(num_processes)]
    return Figures(
        statistics.mean(figures.rows_per_s for figures in found),
        statistics.mean(figures.gemm_gflop_per_s for figures in found),
    )


def _worker(index: int, job: Job, barrier: Any, results: Any) -> None:
    keep_freed_memory()
    torch.set_num_threads(job.threads_per_rank)
    torch.manual_seed(index)
    group, rank = divmod(index, job.world_size)
    sharded = workload.build(
        rank, job.world_size, 29_741 + group, workload.config(job.model, job.precision)
    )
    batches = [workload.random_batch() for _ in range(NUM_BATCHES)]
    _train(sharded, batches)
    rates, gemms = [], []
    for _ in range(job.windows):
        barrier.wait()
        gemms.append(_gemm_gflop_per_s(job.precision))
        barrier.wait()
        started = time.perf_counter()
        _train(sharded, batches)
        dist.barrier()
        rows = NUM_BATCHES * workload.BATCH_SIZE * job.world_size
        rates.append(rows / (time.perf_counter() - started))
    results.put(Figures(statistics.median(rates), statistics.median(gemms)))
    dist.destroy_process_group()


def _train(sharded: Any, batches: list[RankingBatch]) -> None:
    for batch in batches:
        sharded.optimizer.zero_grad(set_to_none=True)
        loss, _ = sharded.model(batch)
        loss.backward()
        sharded.optimizer.step()


def _gemm_gflop_per_s(precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    _ = a @ b
    started = time.perf_counter()
    for _ in range(3):
        _ = a @ b
    return 3 * 2 * GEMM_SIZE**3 / (time.perf_counter() - started) / 1e9


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer windows, about two minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    windows = 5 if args.quick else 15
    os.environ |= WORKER_ENVIRONMENT
    models = {name: _of_model(name, windows) for name in workload.MODELS}
    alone = measure(Job(world_size=1, num_groups=1, threads_per_rank=1, windows=windows))
    apart = measure(Job(world_size=1, num_groups=2, threads_per_rank=1, windows=windows))
    together = measure(Job(world_size=2, num_groups=1, threads_per_rank=1, windows=windows))
    figures = {
        **models,
        "two_ranks": {
            "rows_per_s": together.rows_per_s,
            "one_rank_rows_per_s": alone.rows_per_s,
            "scaling_efficiency": together.rows_per_s / (2 * alone.rows_per_s),
            "communication_share": 1 - together.rows_per_s / (2 * apart.rows_per_s),
            "threads_per_rank": 1,
        },
        **describe(),
    }
    Console().print(_table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


def _of_model(model: str, windows: int) -> dict[str, Any]:
    """Figures of one rank with two threads, by precision."""
    flop_per_row = workload.gemm_flop_per_row(model)
    found: dict[str, Any] = {"gemm_flop_per_row": flop_per_row}
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not cpu_has_bf16():
            reason = "this CPU has neither avx512_bf16 nor amx instructions"
            found[precision] = {"rows_per_s": None, "reason": reason}
            continue
        # A window of the largest model takes ten times as long, so a third of them is enough.
        job = Job(1, 1, 2, max(3, windows // 3) if model == "fgcnn" else windows, model, precision)
        figures = measure(job)
        share = figures.share_of_gemm_limit(flop_per_row)
        found[precision] = asdict(figures) | {"share_of_gemm_limit": share}
    return found


def _table(figures: dict[str, Any]) -> Table:
    table = Table(
        *("figure", "value", "share of the GEMM limit"),
        title="26 tables, 0.9 M rows, D 16, batch 4096",
    )
    for model in workload.MODELS:
        for precision in ("fp32", "bf16"):
            found = figures[model][precision]
            if found["rows_per_s"] is None:
                table.add_row(f"{model} {precision}", found["reason"])
                continue
            rate, share = f"{found['rows_per_s']:,.0f}", f"{found['share_of_gemm_limit']:.0%}"
            table.add_row(f"{model} {precision} rows/s, 2 threads", rate, share)
    two = figures["two_ranks"]
    table.add_row("deepfm, two ranks, 1 thread each, rows/s", f"{two['rows_per_s']:,.0f}")
    table.add_row("  scaling efficiency", f"{two['scaling_efficiency']:.0%}")
    table.add_row("  communication share", f"{two['communication_share']:.0%}")
    return table


if __name__ == "__main__":
    main()

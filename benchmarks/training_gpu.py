"""Training throughput of three models on one GPU, next to what its matrix products allow.

.venv/bin/python benchmarks/training_gpu.py [--quick] [--batch-size N] [--json FILE]

One rank; batches lie on the device, so that the figure is the step's and not the loader's. fp32 is
measured with and without TF32, the tensor cores' 19-bit format for float32 products; bf16 is
autocast. `share_of_gemm_limit` divides by the rows/s at which the model's matrix products alone
would run at the rate of a large product of the same precision, measured in the same process. Needs
a CUDA device and the `fbgemm-gpu` wheel; without them it says so, exit code 2.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import workload
from environment import describe, require_gpu
from rich.console import Console
from rich.table import Table

from embedding.batch import RankingBatch
from embedding.shard import Sharded

NUM_BATCHES = 4
WARMUP_STEPS = 8
STEPS_PER_WINDOW = 16
GEMM_SIZE = 8192
PRECISIONS = ("fp32", "tf32", "bf16")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer windows")
    parser.add_argument("--batch-size", type=int, default=65_536)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    require_gpu()
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    workload.join_group(0, 1, 29_741, device)
    batches = [workload.random_batch(args.batch_size).to(device) for _ in range(NUM_BATCHES)]
    windows = 5 if args.quick else 15
    figures = {
        model: {name: _measure(model, name, batches, windows) for name in PRECISIONS}
        for model in workload.MODELS
    }
    dist.destroy_process_group()
    Console(width=100).print(_table(figures, args.batch_size))
    if args.json:
        found = {"batch_size": args.batch_size, "device": torch.cuda.get_device_name()}
        args.json.write_text(json.dumps(describe() | found | figures, indent=2))
    return 0


def _measure(
    model: str, precision: str, batches: list[RankingBatch], windows: int
) -> dict[str, float]:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    device = batches[0].dense_BF.device
    settings = workload.config(model, "bf16" if precision == "bf16" else "fp32")
    sharded = workload.build_sharded(settings, device)
    for number in range(WARMUP_STEPS):
        _step(sharded, batches[number % NUM_BATCHES])
    torch.cuda.reset_peak_memory_stats()
    seconds, gemms = [], []
    for _ in range(windows):
        gemms.append(_gemm_flop_per_s(precision, device))
        seconds.append(_timed(lambda: _steps(sharded, batches)) / STEPS_PER_WINDOW)
    rows_per_s = len(batches[0].dense_BF) / statistics.median(seconds)
    gemm_flop_per_s = statistics.median(gemms)
    limit = gemm_flop_per_s / workload.gemm_flop_per_row(model)
    return {
        "rows_per_s": rows_per_s,
        "step_ms": 1e3 * statistics.median(seconds),
        "gemm_tflop_per_s": gemm_flop_per_s / 1e12,
        "share_of_gemm_limit": rows_per_s / limit,
        "peak_gib": torch.cuda.max_memory_allocated() / (1 << 30),
    }


def _steps(sharded: Sharded, batches: list[RankingBatch]) -> None:
    for number in range(STEPS_PER_WINDOW):
        _step(sharded, batches[number % NUM_BATCHES])


def _step(sharded: Sharded, batch: RankingBatch) -> None:
    sharded.optimizer.zero_grad(set_to_none=True)
    loss, _ = sharded.model(batch)
    loss.backward()
    sharded.optimizer.step()


def _timed(run: Callable[[], object]) -> float:
    """Seconds on the device, whatever of the host's time it does not hide included."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    run()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


def _gemm_flop_per_s(precision: str, device: torch.device) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    repeats = 3
    seconds = _timed(lambda: [torch.mm(a, b) for _ in range(repeats)])
    return repeats * 2 * GEMM_SIZE**3 / seconds


def _table(figures: dict[str, dict[str, dict[str, float]]], batch_size: int) -> Table:
    table = Table(
        *("model", "precision", "rows/s", "step ms", "GEMM TFLOP/s", "of the GEMM limit", "GiB"),
        title=f"26 tables, 0.9 M rows, D 16, batch {batch_size:,}",
    )
    for model, by_precision in figures.items():
        for precision, found in by_precision.items():
            table.add_row(
                model,
                precision,
                f"{found['rows_per_s']:,.0f}",
                f"{found['step_ms']:.2f}",
                f"{found['gemm_tflop_per_s']:,.0f}",
                f"{found['share_of_gemm_limit']:.0%}",
                f"{found['peak_gib']:.1f}",
            )
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Peak host memory and speed of saving and loading a checkpoint, next to the bytes of the tables.

    .venv/bin/python benchmarks/checkpoint.py [--quick] [--json FILE]

One process, gloo. Peaks are of the resident set, above what the process held before the call.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import workload
from torch import nn

from embedding.checkpoint import Checkpointer
from embedding.config import Adagrad, RowWise, ShardingConfig, TableConfig
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.notices import divert_library_notices
from embedding.planning.plan_timing import status_bytes
from embedding.shard import Sharded, shard
from embedding.tables import EmbeddingTables

MIB = 1 << 20


class TablesOnly(nn.Module):
    """A model that is nothing but its tables."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.tables = EmbeddingTables(schema, torch.device("meta"))


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = 400_000 if args.quick else 2_000_000
    with tempfile.TemporaryDirectory() as scratch:
        divert_library_notices(Path(scratch) / "notices.log")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        figures = measure(rows, Path(scratch))
        dist.destroy_process_group()
    print(f"{'':<18}{'seconds':>10}{'peak MiB over tables':>24}{'share of state':>18}")
    for name in ("save", "save_background", "load"):
        seconds, peak = figures[f"{name}_s"], figures[f"{name}_peak_bytes"]
        share = peak / figures["state_bytes"]
        print(f"{name:<18}{seconds:>10.2f}{peak / MIB:>24.0f}{share:>18.2f}")
    print(f"tables and optimizer state: {figures['state_bytes'] / MIB:.0f} MiB")
    if args.json:
        facts = {
            "hardware": hardware(),
            "commit": commit(),
            "versions": {"torch": torch.__version__},
        }
        args.json.write_text(json.dumps(facts | figures, indent=2))
    return 0


def measure(rows: int, scratch: Path) -> dict[str, float]:
    """Seconds and peak bytes of a save in place, a save in the background, and a load."""
    sharded = build(rows)
    state_bytes = sum(
        tensor.nbytes for s in sharded.shards for tensor in (s.weight_RD, *s.states.values())
    )
    checkpointer = Checkpointer(scratch, keep=1)

    def save_background() -> None:
        checkpointer.save(2, sharded, {}, wait=False)
        checkpointer.wait()

    figures: dict[str, float] = {"state_bytes": state_bytes}
    for name, call in (
        ("save", lambda: checkpointer.save(1, sharded, {})),
        ("save_background", save_background),
        ("load", lambda: checkpointer.load(2, sharded)),
    ):
        figures[f"{name}_s"], figures[f"{name}_peak_bytes"] = peak_of(call)
    checkpointer.close()
    return figures


def build(rows: int) -> Sharded:
    """Two row-wise tables of `rows` x 64 under Adagrad."""
    tables = tuple(
        TableConfig(name=name, num_embeddings=rows, embedding_dim=64, sharding=RowWise())
        for name in ("item", "user")
    )
    features = tuple(SparseFeature(name=f"{t.name}_id", table=t.name) for t in tables)
    model = TablesOnly(FeatureSchema(tables=tables, sparse=features))
    optimizer, device = Adagrad(), torch.device("cpu")
    sharded = shard(
        model,
        optimizer=optimizer,
        sharding=ShardingConfig(),
        dense_optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        device=device,
        plan=workload.plan_here(model, optimizer, device),
    )
    sharded.initialize(seed=0)
    for piece in sharded.shards:
        piece.states["momentum1"].fill_(1.0)  # touch the pages, as training would
    return sharded


def peak_of(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the call, and how far the resident set rose above its start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    before, started = status_bytes("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - started, status_bytes("VmHWM") - before


def hardware() -> str:
    """Processor and number of cores."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Commit of the working tree."""
    root = Path(__file__).parents[1]
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

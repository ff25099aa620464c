"""Parquet to batches: rows per second, and the share of a training run spent waiting for data.

Run: .venv/bin/python benchmarks/loader.py [--quick] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import workload
from environment import describe
from rich.console import Console
from rich.table import Table

from embedding.epochs import Position
from embedding.loader import SampleFiles, SampleLoader
from embedding.memory import keep_freed_memory
from ranking.trainer import Trainer, TrainingHooks


def rows_per_s(source: SampleLoader, num_passes: int) -> list[float]:
    """Throughput of passes over the data, hashed and shuffled, after one that is not counted."""
    rates = []
    for epoch in range(num_passes + 1):
        started, rows = time.perf_counter(), 0
        with source.shuffled(Position(epoch=epoch)) as stream:
            for batch in stream:
                rows += batch.num_rows
        rates.append(rows / (time.perf_counter() - started))
    return rates[1:]


def data_wait_share(files: SampleFiles) -> float:
    """Share of a DeepFM training run's time in which the step waited for its batch."""
    sharded = workload.build(rank=0, world_size=1, port=29_731)
    settings = workload.config()
    trainer = Trainer(
        settings.trainer,
        settings.tasks,
        model=sharded.model,
        optimizer=sharded.optimizer,
        device=workload.CPU,
        hooks=TrainingHooks(report=lambda *_: None, save=lambda _: None, validated=lambda *_: None),
    )
    summary = trainer.fit(SampleLoader(files, batch_size_per_rank=workload.BATCH_SIZE))
    dist.destroy_process_group()
    return summary.totals.data_wait_share


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data, about a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(2)
    train_rows, load_rows = (2**18, 2**20) if args.quick else (2**20, 2**21)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "samples.parquet"
        workload.write_samples(part, train_rows)
        once = SampleFiles([part], workload.SCHEMA, ["click"])
        several = SampleFiles([part] * (load_rows // train_rows), workload.SCHEMA, ["click"])
        source = SampleLoader(several, batch_size_per_rank=workload.BATCH_SIZE)
        rates = rows_per_s(source, num_passes=5)
        share = data_wait_share(once)
    figures = {
        "rows_per_s": statistics.median(rates),
        "rows_per_s_of_passes": rates,
        "data_wait_share": share,
        **describe(),
    }
    table = Table("figure", "value", title="loader: 13 dense + 26 sparse columns")
    table.add_row("rows/s, median of 5 passes", f"{figures['rows_per_s']:,.0f}")
    table.add_row("rows/s, slowest - fastest", f"{min(rates):,.0f} - {max(rates):,.0f}")
    table.add_row("waiting for data in training", f"{share:.2%}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

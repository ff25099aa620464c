"""Device memory of one rank: what the plan predicts, next to the allocator's peak over some steps.

.venv/bin/python benchmarks/plan_memory_gpu.py [--quick] [--json FILE]

Each table set is planned for this GPU alone, sharded and stepped on batches with skewed ids. Needs
a CUDA device and the `fbgemm-gpu` wheel; without them it says so, exit code 2.
"""

import argparse
import gc
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import workload
from environment import describe, require_gpu

from embedding.config import (
    Adam,
    RowWiseAdagrad,
    ShardingConfig,
    SparseOptimizer,
    TableConfig,
)
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.planning.choices import FUSED, UVM_CACHING
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.demand import StepSettings
from embedding.planning.plan_samples import sample_tables
from embedding.planning.plan_timing import PlanRun, measure_peak_bytes
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.synthetic_batches import synthetic_batch
from embedding.planning.this_machine import local_machine

STEPS = 4
NUM_BATCHES = 2
MIB = 1 << 20


@dataclass(frozen=True)
class TableSet:
    """Tables with a batch size and an optimizer."""

    name: str
    schema: FeatureSchema
    batch_size: int
    optimizer: SparseOptimizer
    kernel: str = FUSED


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first three table sets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_gpu()
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    workload.join_group(0, 1, 29_743, device)
    print(f"{'tables':<34}{'predicted MiB':>14}{'peak MiB':>11}{'error':>8}  by kind, MiB")
    rows = []
    for table_set in table_sets()[: 3 if args.quick else None]:
        rows.append(measure(table_set, device))
        print(_line(rows[-1]))
        gc.collect()
        torch.cuda.empty_cache()
    dist.destroy_process_group()
    if args.json:
        args.json.write_text(json.dumps(describe() | {"memory": rows}, indent=2))
    return 0


def table_sets() -> list[TableSet]:
    """Large and small tables, both optimizers, pooled and not, on the device and in host memory."""
    adagrad = RowWiseAdagrad()
    return [
        TableSet("4 x 10 M rows, D 64", _alike(4, 10_000_000, 64, pooling=5), 8192, adagrad),
        TableSet("4 x 5 M rows, D 64, Adam", _alike(4, 5_000_000, 64, pooling=5), 8192, Adam()),
        TableSet("26 x 1 M rows, D 16", _alike(26, 1_000_000, 16, pooling=1), 65_536, adagrad),
        TableSet("mixed, sample 5", _sample(5), 8192, adagrad),
        TableSet("mixed, sample 6, Adam", _sample(6), 8192, Adam()),
        TableSet("2 M items, histories of 50", _history(2_000_000, 64, 50), 4096, adagrad),
        TableSet("2 x 100 k rows, lists of 50", _alike(2, 100_000, 64, pooling=50), 8192, adagrad),
        TableSet(
            "2 x 2 M rows, D 64, cached", _alike(2, 2_000_000, 64, 5), 8192, adagrad, UVM_CACHING
        ),
    ]


def measure(table_set: TableSet, device: torch.device) -> dict[str, Any]:
    """Predicted and measured peak of one table set."""
    request = PlanRequest(
        schema=table_set.schema,
        shape=ClusterShape(machine=local_machine(str(device)), ranks_per_host=1),
        settings=StepSettings(table_set.batch_size, table_set.optimizer),
        kernels=(table_set.kernel,),
    )
    plan = plan_tables(request)
    assert plan.predicted is not None
    batches = [
        synthetic_batch(table_set.schema, request.loads(), table_set.batch_size, seed).to(device)
        for seed in range(NUM_BATCHES)
    ]
    make = partial(
        PlanRun,
        table_set.schema,
        plan,
        optimizer=table_set.optimizer,
        sharding=ShardingConfig(),
        batches=batches,
        device=device,
    )
    peak = measure_peak_bytes(make, STEPS, device)
    predicted = plan.predicted.peak_bytes
    return {
        "tables": table_set.name,
        "shardings": sorted({f"{table.sharding} {table.kernel}" for table in plan.tables}),
        "predicted_bytes": predicted,
        "peak_bytes": peak,
        "relative_error": predicted / peak - 1,
        "predicted_by_kind": plan.predicted.ranks[0].bytes,
    }


def _line(row: dict[str, Any]) -> str:
    kinds = (f"{kind} {n / MIB:,.0f}" for kind, n in row["predicted_by_kind"].items() if n >= MIB)
    return (
        f"{row['tables']:<34}{row['predicted_bytes'] / MIB:>14,.0f}"
        f"{row['peak_bytes'] / MIB:>11,.0f}{row['relative_error']:>+8.1%}  "
        f"{', '.join(kinds)} ({'; '.join(row['shardings'])})"
    )


def _alike(num_tables: int, rows: int, dim: int, pooling: int) -> FeatureSchema:
    names = [f"t{index}" for index in range(num_tables)]
    return FeatureSchema(
        tables=tuple(
            TableConfig(name=name, num_embeddings=rows, embedding_dim=dim) for name in names
        ),
        sparse=tuple(
            SparseFeature(name=f"f_{name}", table=name, max_length=pooling) for name in names
        ),
    )


def _sample(seed: int) -> FeatureSchema:
    return sample_tables(seed, min_tables=8, max_rows=10_000_000).schema


def _history(rows: int, dim: int, length: int) -> FeatureSchema:
    return FeatureSchema(
        tables=(TableConfig(name="item", num_embeddings=rows, embedding_dim=dim),),
        sparse=(SparseFeature(name="item_id", table="item"),),
        histories=(HistoryConfig(name="past", max_length=length),),
        sequences=(SequenceFeature(name="past_item", history="past", table="item"),),
    )


if __name__ == "__main__":
    sys.exit(main())

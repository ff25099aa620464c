"""A bundle with int8 tables beside the same one in fp32: bytes, memory, loading, scoring, AUC.

Run: .venv/bin/python benchmarks/int8_tables.py [--quick] [--json FILE]
         [--out OUT --date D --samples DIR]

Without --out the model is DeepFM on 26 random tables of dim 16, and there is no AUC. With it, it is
that of a trained day of an output directory, and --samples are joined rows that it has not seen,
like those of a later day's join. Every measurement has a process of its own; fp32 and int8 take
turns, and figures are medians. Loading includes the check of all files. OMP_NUM_THREADS is obeyed;
processor time tells the two apart on a busy machine, too.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import workload
from environment import describe
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor

from deploy.bundle import write_bundle
from deploy.export import export_bundle
from deploy.predictor import Predictor
from deploy.scoring import sample_files
from embedding.batch import RankingBatch
from embedding.checkpoint import Checkpointer
from embedding.checkpoint_files import step_directory
from embedding.int8_tables import Int8Tables
from embedding.loader import SampleFiles, SampleLoader
from embedding.memory import keep_freed_memory
from embedding.planning.plan_timing import status_bytes
from pipeline.config import DataConfig, PublishConfig, Recipe
from pipeline.gate_config import GateConfig

PRECISIONS = ("fp32", "int8")
BATCH_SIZES = (256, 4096)
MOST_ROWS = 1 << 15
"""Scored a measurement: of real samples the first ones."""
NUM_PASSES = 3
MIB = 1 << 20


def make_bundles(folder: Path, rows_per_table: int) -> None:
    """Both bundles of an untrained DeepFM, and samples for it."""
    tables = tuple(
        table.model_copy(update={"num_embeddings": rows_per_table})
        for table in workload.SCHEMA.tables
    )
    schema = workload.SCHEMA.model_copy(update={"tables": tables})
    sharded = workload.build(rank=0, world_size=1, port=29_741, schema=schema)
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(1, sharded, {})
    checkpointer.close()
    dist.destroy_process_group()
    for precision in PRECISIONS:
        recipe = Recipe(
            name="int8",
            data=DataConfig(root=folder),
            features=schema,
            ranking=workload.config(),
            gate=GateConfig(task="click"),
            publish=PublishConfig(tables=precision),
        )
        write_bundle(recipe, step_directory(folder / "checkpoints", 1), folder / precision)
    workload.write_samples(folder / "samples" / "part.parquet", workload.ROW_GROUP_ROWS)


def measure(bundle: Path, samples: Path, has_labels: bool) -> dict[str, float]:
    """Figures of one bundle in this process, which has loaded none before."""
    keep_freed_memory()
    before, started = status_bytes("VmRSS"), time.perf_counter()
    predictor = Predictor(bundle)
    figures = {"load_s": time.perf_counter() - started}
    figures["resident_bytes"] = status_bytes("VmRSS") - before
    figures["table_bytes"] = sum(tensor.nbytes for tensor in table_tensors(predictor))
    figures["bundle_bytes"] = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file())
    tasks = predictor.tasks if has_labels else []
    files = SampleFiles(
        sample_files(samples), predictor.schema, tasks=tasks, items=predictor.item_source
    )
    for size in BATCH_SIZES:
        batches = read_batches(files, size)
        figures |= speed(predictor, batches, size)
    for task, name in enumerate(tasks):
        figures[f"auc.{name}"] = auc(predictor, batches, task)
    return figures


def speed(predictor: Predictor, batches: list[RankingBatch], size: int) -> dict[str, float]:
    """Rows a second, and processor time of a row."""
    for batch in batches[:3]:
        predictor.predict(batch)
    num_rows, seconds, cpu_seconds = sum(batch.num_rows for batch in batches), [], []
    for _ in range(NUM_PASSES):
        started, cpu_started = time.perf_counter(), time.process_time()
        for batch in batches:
            predictor.predict(batch)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {
        f"rows_per_s.{size}": num_rows / statistics.median(seconds),
        f"cpu_us_per_row.{size}": 1e6 * statistics.median(cpu_seconds) / num_rows,
    }


def auc(predictor: Predictor, batches: list[RankingBatch], task: int) -> float:
    """Of the rows that have the task's label."""
    labels, scores = [], []
    for batch in batches:
        # Rows that fill up the batch weigh nothing.
        has_label_B = (batch.weights_BT[:, task] > 0) & ~batch.labels_BT[:, task].isnan()
        labels.append(batch.labels_BT[has_label_B, task])
        scores.append(predictor.predict(batch)[has_label_B, task])
    return float(roc_auc_score(torch.cat(labels), torch.cat(scores)))


def table_tensors(predictor: Predictor) -> list[Tensor]:
    """What holds the tables."""
    if isinstance(predictor.tables, Int8Tables):
        return list(predictor.tables.rows.values())
    return list(predictor.tables.parameters())


def read_batches(files: SampleFiles, size: int) -> list[RankingBatch]:
    """The first `MOST_ROWS` rows."""
    batches: list[RankingBatch] = []
    with SampleLoader(files, batch_size_per_rank=size).sequential() as stream:
        for batch in stream:
            batches.append(batch)
            if len(batches) * size >= MOST_ROWS:
                break
    return batches


def in_own_process(call: Callable[..., Any], *arguments: object) -> Any:
    """The result of a call in a new process.

    It is forked, for importing takes longer than most measurements: this one must compute nothing.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(call, *arguments).result()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller tables, a few minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--out", type=Path, help="output directory with a trained day")
    parser.add_argument("--date", help="the day")
    parser.add_argument("--samples", type=Path, help="joined rows with labels")
    args = parser.parse_args()
    if len({bool(given) for given in (args.out, args.date, args.samples)}) > 1:
        parser.error("--out, --date and --samples go together")
    runs: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as scratch:
        folder, samples = Path(scratch), args.samples or Path(scratch) / "samples"
        if args.out:
            for precision in PRECISIONS:
                to = folder / precision
                in_own_process(export_bundle, args.out, args.date, to, precision)
        else:
            (folder / "samples").mkdir()
            in_own_process(make_bundles, folder, 100_000 if args.quick else 1_000_000)
        for _ in range(3 if args.quick else 7):
            for precision in PRECISIONS:
                found = in_own_process(measure, folder / precision, samples, bool(args.out))
                runs[precision].append(found)
    medians = {
        precision: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for precision, found in runs.items()
    }
    ratio = {key: medians["int8"][key] / medians["fp32"][key] for key in medians["fp32"]}
    Console().print(figures_table(medians, ratio))
    if args.json:
        figures = {**medians, "int8_over_fp32": ratio, "runs": runs}
        figures |= {"threads": torch.get_num_threads(), **describe()}
        args.json.write_text(json.dumps(figures, indent=2))


def figures_table(medians: dict[str, dict[str, float]], ratio: dict[str, float]) -> Table:
    """One row a figure."""
    table = Table("figure", "fp32", "int8", "int8 / fp32", title="tables of a bundle")
    for key, share in ratio.items():
        values = [medians[precision][key] for precision in PRECISIONS]
        if key.endswith("_bytes"):
            name, shown = key.replace("_bytes", ", MiB"), [f"{v / MIB:,.1f}" for v in values]
        elif key.startswith("rows"):
            name, shown = f"rows/s, batch {key.split('.')[1]}", [f"{v:,.0f}" for v in values]
        elif key.startswith("cpu"):
            name = f"processor us a row, batch {key.split('.')[1]}"
            shown = [f"{v:.1f}" for v in values]
        else:
            name, shown = key, [f"{v:.4f}" for v in values]
        table.add_row(name, *shown, f"{share:.4f}" if key.startswith("auc") else f"{share:.3f}")
    return table


if __name__ == "__main__":
    main()

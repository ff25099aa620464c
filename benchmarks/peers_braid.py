"""The Braid side of `peers.py`: training from Parquet through the loader, in a process of its own.

Arguments: a JSON object. Then one command a line on stdin, one JSON object a line on stdout.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import workload

from embedding.batch import RankingBatch
from embedding.config import Identity, RowWiseAdagrad, TableConfig
from embedding.epochs import Position
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.loader import SampleFiles, SampleLoader
from embedding.memory import keep_freed_memory
from embedding.precision import check_precision
from embedding.shard import Sharded
from ranking.evaluation import evaluate_predictions
from ranking.prediction import predict


def schema(rows_per_table: list[int]) -> FeatureSchema:
    """One categorical feature a table; ids are rows already, the OOV row comes on top."""
    return FeatureSchema(
        tables=tuple(
            TableConfig(name=f"t{i}", num_embeddings=rows + 1, ids=Identity())
            for i, rows in enumerate(rows_per_table)
        ),
        sparse=tuple(
            SparseFeature(name=f"s{i}", table=f"t{i}") for i in range(len(rows_per_table))
        ),
    )


class Side:
    """One model and its data."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.schema = schema(job["rows_per_table"])
        self.settings = workload.config(job["model"], job["precision"], compiled=job["compiled"])
        check_precision(job["precision"], workload.CPU, "precision")
        self.sharded = self._build()
        self.source = self._loader(job["train"])
        self.data = self._endless()

    def _build(self) -> Sharded:
        return workload.build(
            0,
            1,
            self.job["port"],
            self.settings,
            schema=self.schema,
            optimizer=RowWiseAdagrad(learning_rate=0.1),
        )

    def _loader(self, path: str) -> SampleLoader:
        files = SampleFiles([Path(path)], self.schema, ["click"])
        return SampleLoader(files, batch_size_per_rank=self.job["batch_size"])

    def _endless(self) -> Iterator[RankingBatch]:
        epoch = 0
        while True:
            with self.source.shuffled(Position(epoch=epoch)) as stream:
                yield from (batch for batch in stream if batch.num_rows == self.job["batch_size"])
            epoch += 1

    def step(self, batch: RankingBatch) -> None:
        """One training step."""
        self.sharded.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.sharded.model(batch)
        loss.backward()
        self.sharded.optimizer.step()

    def train(self, steps: int) -> float:
        """Rows per second of some steps, reading included."""
        self.sharded.model.train()
        started = time.perf_counter()
        rows = 0
        for _ in range(steps):
            batch = next(self.data)
            self.step(batch)
            rows += batch.num_rows
        return rows / (time.perf_counter() - started)

    def epoch(self) -> dict[str, float]:
        """AUC and logloss on the test file after one epoch from the start values."""
        self.sharded = self._fresh()
        self.sharded.model.train()
        with self.source.shuffled(Position()) as stream:
            for batch in stream:
                if batch.num_rows == self.job["batch_size"]:
                    self.step(batch)
        with self._loader(self.job["test"]).sequential() as stream:
            found = list(predict(self.sharded.model, stream, workload.CPU))
        probs = torch.cat([part.probs_RT for part in found]).squeeze(1).double().numpy()
        labels = torch.cat([part.labels_RT for part in found]).squeeze(1).numpy()
        groups = torch.zeros(len(labels)).numpy()
        metrics = evaluate_predictions(labels=labels, probs=probs, groups=groups)
        assert metrics.auc is not None
        assert metrics.logloss is not None
        return {"auc": metrics.auc, "logloss": metrics.logloss}

    def _fresh(self) -> Sharded:
        torch.distributed.destroy_process_group()
        torch.manual_seed(0)
        return self._build()


def main() -> None:
    """Obey the commands."""
    job = json.loads(sys.argv[1])
    keep_freed_memory()
    torch.set_num_threads(job["threads"])
    side = Side(job)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, float] = (
            {"rows_per_s": side.train(command["steps"])} if "steps" in command else side.epoch()
        )
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The evaluate stage: predict on the worker group, then metrics per task and slice.

Reads the train artifact, sample files and the event counts of the run's date; writes
`predictions/rank-N.parquet` (keys, labels, probabilities), `metrics.json` and, on synthetic data,
`oracle.json`: the same metrics of the true probability.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedding import samples as columns
from embedding.config import StrictConfig
from pipeline.artifacts import StageFacts
from pipeline.config import EvaluationConfig, Recipe
from pipeline.metrics_file import METRICS_FILE, ORACLE_FILE, write_metrics
from pipeline.refusal import refusing_once
from pipeline.stages import StageOutput
from pipeline.train import TrainedModel
from pipeline.worker_group import RunWorkers, run_workers
from ranking.evaluation import evaluate_predictions
from ranking.task_metrics import TaskMetrics

PREDICTIONS = "predictions"
COLD = "cold"
"""Slice of the candidates that no event had shown by the date."""
SLICES = (COLD, "rare", "middle", "popular", "new_users")
Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]


class EvaluateFacts(StageFacts):
    """The first figure that one looks for; `metrics.json` has all."""

    auc: dict[str, float | None]
    """By task; None where it is not defined."""


class EvaluateJob(StrictConfig):
    """All a predicting worker needs to know; crosses to it as JSON."""

    model: TrainedModel
    samples: list[Path]
    predictions: Path


def evaluate(
    model: TrainedModel,
    *,
    samples: list[Path],
    counts: Path,
    scratch: Path,
    run: RunWorkers = run_workers,
) -> StageOutput:
    """Predict `samples` with a trained model and compute its metrics.

    Args:
        model: its recipe gives tasks, slices and the worker group.
        samples: sample files of the evaluation days.
        counts: directory of the ingest artifact that ends at the run's date.
        scratch: where to write.
        run: runs the predicting worker on every rank.
    """
    recipe, predictions = model.recipe, scratch / PREDICTIONS
    predictions.mkdir()
    job = EvaluateJob(
        model=model,
        samples=[path.absolute() for path in samples],
        predictions=predictions.absolute(),
    )
    run(_predict_worker, job, recipe.cluster, scratch)
    predicted = read_predictions(predictions)
    slices = Slices.read(counts, recipe.evaluation)
    metrics = task_metrics(recipe, predicted, slices, columns.probability_column)
    write_metrics(metrics, scratch / METRICS_FILE)
    oracle = oracle_metrics(recipe, predicted, slices, samples)
    if oracle:
        write_metrics(oracle, scratch / ORACLE_FILE)
    rows = predicted.num_rows
    auc = {name: value.auc for name, value in metrics.items()}
    return StageOutput(rows, rows, EvaluateFacts(auc=auc))


def read_predictions(directory: Path) -> pa.Table:
    """All predictions; ranks hold consecutive shares of the samples, so their order is kept."""
    ranks = sorted(directory.glob("rank-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in ranks])


@dataclass(frozen=True)
class Slices:
    """Which items and users were seen up to the run's date, and how often."""

    item_ids: Ids
    """Ascending."""
    item_events: Ids
    user_ids: Ids
    """Ascending."""
    config: EvaluationConfig

    @classmethod
    def read(cls, counts: Path, config: EvaluationConfig) -> "Slices":
        """From the event counts of an ingest artifact."""
        items = pq.read_table(counts / "item_counts.parquet").sort_by("item_id")
        users = pq.read_table(counts / "user_counts.parquet").sort_by("user_id")
        return cls(
            items["item_id"].to_numpy(),
            items["events"].to_numpy(),
            users["user_id"].to_numpy(),
            config,
        )

    def masks(self, item_ids: Ids, user_ids: Ids) -> dict[str, Mask]:
        """Rows of every slice; those of items have no row in common."""
        index = np.searchsorted(self.item_ids, item_ids).clip(max=len(self.item_ids) - 1)
        events = np.where(self.item_ids[index] == item_ids, self.item_events[index], 0)
        cold = events == 0
        rare = ~cold & (events <= self.config.rare_max_events)
        popular = ~(cold | rare) & self._is_most_frequent()[index]
        middle, new_users = ~(cold | rare | popular), ~np.isin(user_ids, self.user_ids)
        return dict(zip(SLICES, (cold, rare, middle, popular, new_users), strict=True))

    def _is_most_frequent(self) -> Mask:
        """The `popular_share` of the items; of equally frequent ones those of the lowest ids.

        A share and not a number of events: where most items have as many, all would reach it.
        """
        num_popular = max(1, round(self.config.popular_share * len(self.item_ids)))
        is_popular = np.zeros(len(self.item_ids), bool)
        is_popular[np.argsort(-self.item_events, kind="stable")[:num_popular]] = True
        return is_popular


def task_metrics(
    recipe: Recipe, predicted: pa.Table, slices: Slices, score_column: Callable[[str], str]
) -> dict[str, TaskMetrics]:
    """Metrics of every task over the rows where it is observed."""
    masks = slices.masks(_key(predicted, "item_id"), _key(predicted, "user_id"))
    groups = _key(predicted, recipe.evaluation.group_by)
    found = {}
    for task in recipe.ranking.tasks:
        name = score_column(task.name)
        if name not in predicted.column_names:
            continue
        found[task.name] = evaluate_predictions(
            labels=predicted[columns.label_column(task.name)].to_numpy(),
            probs=predicted[name].to_numpy(),
            groups=groups,
            weights=predicted[columns.weight_column(task.name)].to_numpy(),
            slices=masks,
        )
    return found


def oracle_metrics(
    recipe: Recipe, predicted: pa.Table, slices: Slices, samples: list[Path]
) -> dict[str, TaskMetrics]:
    """Metrics of the true probability, which only synthetic samples carry; else empty."""
    names = [columns.oracle_column(task.name) for task in recipe.ranking.tasks]
    names = [name for name in names if name in pq.read_schema(samples[0]).names]
    if not names:
        return {}
    truth = pa.concat_tables([pq.read_table(path, columns=names) for path in samples])
    for name in names:
        predicted = predicted.append_column(name, truth[name])
    return task_metrics(recipe, predicted, slices, columns.oracle_column)


def _key(table: pa.Table, name: str) -> Ids:
    ids: Ids = table[columns.key_column(name)].to_numpy()
    return ids


def _predict_worker(config: dict[str, str]) -> None:
    """Runs on every rank; torchrec is imported here and not in the driver."""
    from pipeline.training_worker import predict_worker

    job = EvaluateJob.model_validate_json(config["job"])
    with refusing_once(job.predictions.parent):
        predict_worker(job)

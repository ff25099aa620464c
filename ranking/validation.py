"""Validation during training: metrics of the held-out rows, and what follows from them."""

# Shapes: T tasks.

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Protocol

import torch
from torch import nn

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.loader import BatchStream
from ranking.config import TaskConfig
from ranking.metrics import MetricSums, TaskValues, all_reduce_sums
from ranking.trainer_config import Plateau, TrainerConfig, ValidationConfig

DIVERGED = (
    "training has diverged; lower ranking.trainer.dense_optimizer.learning_rate and "
    "embedding.optimizer.learning_rate (with content, those of content.optimizer, too), or set "
    "ranking.trainer.max_grad_norm and content.optimizer.max_grad_norm"
)
"""What a number that is not finite means, and what to do."""


class ValidationSource(Protocol):
    """Where held-out rows come from; `embedding.loader.SampleLoader` is one."""

    def sequential(self) -> BatchStream:
        """All rows once; equally many batches on every rank."""


class ValidationState(StrictConfig):
    """What the validations so far have shown. Equal on all ranks, and part of a checkpoint."""

    last_step: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    since_best: int = 0
    """Validations since the best one."""
    since_cut: int = 0
    """Validations without improvement since the best one or the last cut of the rates."""
    rate_factor: float = 1.0
    """Product of all cuts."""

    def after(self, step: int, value: float, config: TrainerConfig) -> "ValidationState":
        """The state after one more validation."""
        if self._improves(value, config.validation):
            return ValidationState(
                last_step=step, best_step=step, best_value=value, rate_factor=self.rate_factor
            )
        since_cut, factor = self.since_cut + 1, self.rate_factor
        plateau: Plateau | None = config.schedule.plateau
        if plateau is not None and since_cut >= plateau.patience:
            since_cut, factor = 0, factor * plateau.factor
        return ValidationState(
            last_step=step,
            best_step=self.best_step,
            best_value=self.best_value,
            since_best=self.since_best + 1,
            since_cut=since_cut,
            rate_factor=factor,
        )

    def should_stop(self, config: ValidationConfig) -> bool:
        """Whether training has not improved for as long as it may."""
        return config.patience is not None and self.since_best >= config.patience

    def _improves(self, value: float, config: ValidationConfig) -> bool:
        if self.best_value is None:
            return True
        gain = value - self.best_value if config.metric == "auc" else self.best_value - value
        return gain > config.min_improvement


def validate(
    model: nn.Module, source: ValidationSource, device: torch.device, num_tasks: int
) -> list[TaskValues]:
    """Metrics of every task over the held-out rows of all ranks; all ranks must call it.

    Args:
        model: a `RankingStep`, sharded or not; left in the mode it is in.
        source: gives the rows.
        device: of the model.
        num_tasks: T.
    """
    was_training = model.training
    model.eval()
    sums = MetricSums.zeros(num_tasks, device)
    with torch.no_grad(), source.sequential() as stream:
        for batch in stream:
            _, (logits_BT, labels_BT, weights_BT, _) = model(batch.to(device))
            sums.update(logits_BT, labels_BT, weights_BT)
    model.train(was_training)
    (sums_TX,) = all_reduce_sums([sums.sums_TX])
    return MetricSums(sums_TX).values()


def deciding_value(
    config: ValidationConfig, tasks: Sequence[TaskConfig], values: Sequence[TaskValues]
) -> float:
    """The number that validations are compared by.

    Raises:
        UserError: a task's metric is not defined on the held-out rows, or is not finite.
    """
    found = []
    for task, task_values in zip(tasks, values, strict=True):
        if config.task not in (None, task.name):
            continue
        value: float | None = getattr(task_values, config.metric)
        if value is None:
            raise UserError(
                f"ranking.trainer.validation: {config.metric} of task {task.name!r} is not defined "
                "on the held-out days, where its labels are missing or all equal; raise "
                "window.validation_days, or name another validation.task"
            )
        if not math.isfinite(value):
            raise UserError(
                f"the {config.metric} of task {task.name!r} on the held-out days is {value}: "
                f"{DIVERGED}"
            )
        found.append(value)
    return sum(found) / len(found)


def validation_metrics(
    tasks: Sequence[TaskConfig], values: Sequence[TaskValues], state: ValidationState
) -> dict[str, float]:
    """Metric keys `validation/<task>/<name>` and the state's; undefined ones are left out."""
    metrics: dict[str, float] = {"validation/since_best": float(state.since_best)}
    for task, task_values in zip(tasks, values, strict=True):
        for item in fields(TaskValues):
            value = getattr(task_values, item.name)
            if value is not None:
                metrics[f"validation/{task.name}/{item.name}"] = value
    return metrics


def validation_line(step: int, tasks: Sequence[TaskConfig], metrics: dict[str, float]) -> str:
    """One line for a person."""
    parts = [f"validation at step {step}"]
    for task in tasks:
        keys = [(name, f"validation/{task.name}/{name}") for name in ("ne", "auc")]
        shown = [f"{name} {metrics[key]:.4f}" for name, key in keys if key in metrics]
        parts += shown if len(tasks) == 1 else [" ".join([task.name, *shown])]
    since = int(metrics["validation/since_best"])
    parts.append("best" if since == 0 else f"best {since} before")
    return " | ".join(parts)

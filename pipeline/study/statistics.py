"""What a study says: metrics of every variant over its seeds, compared with the first variant."""

# S seeds of one variant.

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from embedding.config import StrictConfig
from ranking.task_metrics import SliceMetrics, TaskMetrics

CONFIDENCE = 0.95
METRICS: dict[str, Literal["higher", "lower"] | None] = {
    "auc": "higher",
    "gauc": "higher",
    "logloss": "lower",
    "ne": "lower",
    "calibration": None,
    "num_rows": None,
}
"""Of every task, and of every slice of its rows; which values are better, where one can say."""
OF_A_TRIAL = ("train.rows_per_s", "trial.seconds")
"""Of the machine as much as of the variant: trials run side by side and share it."""


class Estimate(StrictConfig):
    """A metric of one variant."""

    mean: float
    ci95: float | None
    """Half the width of Student's 95% interval of the mean; None with one seed."""
    values: tuple[float, ...]
    """By seed, in the order of `seeds`."""
    seeds: tuple[int, ...]
    """Seeds whose trial finished and has the metric: a slice may hold one class only."""


class Difference(StrictConfig):
    """A metric of one variant minus that of the first variant, seed by seed."""

    diff: float
    ci95: float | None
    """Half the width of the paired 95% interval; None with one seed."""
    seeds: tuple[int, ...]
    """Seeds for which both have the metric."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does."""
        return self.ci95 is not None and abs(self.diff) > self.ci95


class StudyResult(StrictConfig):
    """`study.json`, and what `braid study --json` writes; version 1."""

    schema_version: Literal[1] = 1
    recipe: str
    date: str
    seeds: tuple[int, ...]
    variants: dict[str, dict[str, Estimate]]
    """By variant and metric, e.g. `like.auc`, `like.cold.auc`, `train.rows_per_s`."""
    paired: dict[str, dict[str, Difference]]
    """Against the first variant; that one has no entry."""
    overrides: dict[str, tuple[str, ...]]
    """What each variant changes in the recipe."""
    failed: dict[str, str] = {}
    """Trials that did not finish, as `variant/seed-N`, and why. Their seeds count for no comparison
    of that variant, and where it is the first one for none at all; means of other variants keep
    them."""


def is_better(metric: str, diff: float) -> bool | None:
    """Whether a variant that differs by `diff` in a metric is the better one; None: not said.

    Args:
        metric: `task.metric`, `task.slice.metric`, or one of `OF_A_TRIAL`.
        diff: to the first variant.
    """
    direction = METRICS.get(metric.rpartition(".")[2])
    return None if direction is None else (diff > 0) == (direction == "higher")


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of Student's 95% interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / np.sqrt(len(values)))


def estimates(trials: Mapping[int, Mapping[str, float]]) -> dict[str, Estimate]:
    """Metrics of one variant from its trials by seed, each over the seeds that have it."""
    found = {}
    for name in _names(trials.values()):
        by_seed = {seed: trial[name] for seed, trial in trials.items() if name in trial}
        values = tuple(by_seed.values())
        found[name] = Estimate(
            mean=float(np.mean(values)),
            ci95=half_width(values),
            values=values,
            seeds=tuple(by_seed),
        )
    return found


def differences(
    trials: Mapping[int, Mapping[str, float]], first: Mapping[int, Mapping[str, float]]
) -> dict[str, Difference]:
    """Metrics of one variant minus those of the first, paired by seed; of seeds that have both."""
    found = {}
    for name in _names(trials.values()):
        by_seed = {
            seed: trial[name] - first[seed][name]
            for seed, trial in trials.items()
            if name in trial and name in first.get(seed, {})
        }
        if by_seed:
            values = tuple(by_seed.values())
            found[name] = Difference(
                diff=float(np.mean(values)), ci95=half_width(values), seeds=tuple(by_seed)
            )
    return found


def trial_metrics(tasks: Mapping[str, TaskMetrics]) -> dict[str, float]:
    """`task.metric` and `task.slice.metric` of one evaluation; undefined ones are left out."""
    found: dict[str, float] = {}
    for task, metrics in tasks.items():
        parts: dict[str, SliceMetrics] = {task: metrics}
        parts |= {f"{task}.{name}": part for name, part in metrics.slices.items()}
        for prefix, part in parts.items():
            values = {name: getattr(part, name) for name in METRICS}
            found |= {f"{prefix}.{name}": v for name, v in values.items() if v is not None}
    return found


def _names(trials: Iterable[Mapping[str, float]]) -> list[str]:
    return [*dict.fromkeys(name for trial in trials for name in trial)]

"""What a study says: metrics of every variant over its seeds, compared with the first variant."""

# S seeds of one variant.

from collections.abc import Mapping, Sequence
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
    """Seeds whose trial finished."""


class Difference(StrictConfig):
    """A metric of one variant minus that of the first variant, seed by seed."""

    diff: float
    ci95: float | None
    """Half the width of the paired 95% interval; None with one seed."""
    seeds: tuple[int, ...]
    """Seeds whose trial finished for both."""

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
    """Metrics of one variant from its trials by seed; a metric that a trial lacks is left out."""
    names = [name for name in next(iter(trials.values()), {}) if _everywhere(name, trials)]
    found = {}
    for name in names:
        values = tuple(trial[name] for trial in trials.values())
        mean = float(np.mean(values))
        found[name] = Estimate(
            mean=mean, ci95=half_width(values), values=values, seeds=tuple(trials)
        )
    return found


def differences(
    trials: Mapping[int, Mapping[str, float]], first: Mapping[int, Mapping[str, float]]
) -> dict[str, Difference]:
    """Metrics of one variant minus those of the first, paired by seed."""
    seeds = [seed for seed in trials if seed in first]
    both = {seed: trials[seed] for seed in seeds}
    names = [
        name
        for name in (both[seeds[0]] if seeds else {})
        if _everywhere(name, both) and _everywhere(name, {seed: first[seed] for seed in seeds})
    ]
    found = {}
    for name in names:
        values = [trials[seed][name] - first[seed][name] for seed in seeds]
        found[name] = Difference(
            diff=float(np.mean(values)), ci95=half_width(values), seeds=tuple(seeds)
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


def _everywhere(name: str, trials: Mapping[int, Mapping[str, float]]) -> bool:
    return all(name in trial for trial in trials.values())

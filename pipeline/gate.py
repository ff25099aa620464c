"""The gate: what a model must show before it is published.

Reads `evaluate/metrics.json` and the metrics of the model it would replace, as that one was
published with them (on the days after its own date); writes `gate.json`.
"""

from pathlib import Path
from typing import Literal

from embedding.config import StrictConfig
from pipeline.config import Recipe, TaskGate
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.registry import PublishedModel
from pipeline.stages import StageOutput
from ranking.evaluation import TaskMetrics

GATE = "gate.json"


class GateDecision(StrictConfig):
    """Whether a model may be published, and why not; version 1."""

    schema_version: Literal[1] = 1
    passed: bool
    reasons: tuple[str, ...]
    """One sentence per broken rule; empty when it passed."""
    compared_with: str | None
    """Date of the bundle it was compared with."""


def decide(
    rules: TaskGate, where: str, metrics: TaskMetrics, production_auc: float | None
) -> tuple[str, ...]:
    """Rules of a task that its metrics break, one sentence each; none means publish.

    Args:
        rules: of the task.
        where: path of the rules in the recipe.
        metrics: of the task.
        production_auc: of the model that would be replaced; None: there is none to compare with.
    """
    few = _too_few(rules, where, metrics)
    if few is not None:  # no other figure says anything then
        return (few,)
    reasons = []
    assert metrics.auc is not None, "both classes are there"
    if metrics.auc < rules.min_auc:
        reasons.append(f"auc {metrics.auc:.4f} is below {where}.min_auc={rules.min_auc}")
    low, high = rules.calibration
    if metrics.calibration is None or not low <= metrics.calibration <= high:
        reasons.append(
            f"calibration {metrics.calibration} is outside {where}.calibration=[{low}, {high}]"
        )
    if rules.max_auc_drop is not None and production_auc is not None:
        drop = production_auc - metrics.auc
        if drop > rules.max_auc_drop:
            reasons.append(
                f"auc fell by {drop:.4f} against production, more than "
                f"{where}.max_auc_drop={rules.max_auc_drop}"
            )
    return tuple(f"{rules.task}: {reason}" for reason in reasons)


def _too_few(rules: TaskGate, where: str, metrics: TaskMetrics) -> str | None:
    positives = round(metrics.num_rows * (metrics.label_rate or 0))
    counts = {
        "evaluation rows": (metrics.num_rows, "min_rows", rules.min_rows),
        "evaluation rows with label 1": (positives, "min_rows_per_class", rules.min_rows_per_class),
        "evaluation rows with label 0": (
            metrics.num_rows - positives,
            "min_rows_per_class",
            rules.min_rows_per_class,
        ),
    }
    for what, (count, key, least) in counts.items():
        if count < least:
            return (
                f"{rules.task}: {count} {what} are too few to judge a model by, fewer than "
                f"{where}.{key}={least}; evaluate on more days (window.eval_days), or lower it"
            )
    return None


def gate(
    recipe: Recipe, evaluation: Path, current: PublishedModel | None, scratch: Path
) -> StageOutput:
    """Decide and write the decision; `current` is the model that would be replaced."""
    found = read_metrics(evaluation / METRICS_FILE)
    before = {} if current is None else read_metrics(current.directory / METRICS_FILE)
    reasons: tuple[str, ...] = ()
    for index, rules in enumerate(recipe.gate.tasks):
        where = "gate" if index == 0 else f"gate.also.{index - 1}"
        reference = before[rules.task].auc if rules.task in before else None
        reasons += decide(rules, where, found[rules.task], reference)
    metrics = found[recipe.gate.task]
    decision = GateDecision(
        passed=not reasons,
        reasons=reasons,
        compared_with=None if current is None else current.date,
    )
    (scratch / GATE).write_text(decision.model_dump_json(indent=2))
    return StageOutput(
        rows_in=metrics.num_rows,
        rows_out=metrics.num_rows,
        facts=decision.model_dump(mode="json"),
    )

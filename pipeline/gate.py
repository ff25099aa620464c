"""The gate: what a model must show before it is published.

Reads `evaluate/metrics.json` and the metrics of the model it would replace, as that one was
published with them (on the days after its own date); writes `gate.json`.
"""

from pathlib import Path
from typing import Literal

from embedding.config import StrictConfig
from pipeline.config import GateConfig, Recipe
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
    config: GateConfig, metrics: TaskMetrics, production_auc: float | None
) -> tuple[str, ...]:
    """Rules the metrics break, one sentence each; none means publish."""
    reasons = []
    if metrics.auc is None:
        reasons.append(f"{config.task}: the evaluation rows have one class only, so no AUC")
    elif metrics.auc < config.min_auc:
        reasons.append(
            f"{config.task}: auc {metrics.auc:.4f} is below gate.min_auc={config.min_auc}"
        )
    low, high = config.calibration
    if metrics.calibration is None or not low <= metrics.calibration <= high:
        reasons.append(
            f"{config.task}: calibration {metrics.calibration} is outside "
            f"gate.calibration=[{low}, {high}]"
        )
    if config.max_auc_drop is not None and production_auc is not None and metrics.auc is not None:
        drop = production_auc - metrics.auc
        if drop > config.max_auc_drop:
            reasons.append(
                f"{config.task}: auc fell by {drop:.4f} against production, more than "
                f"gate.max_auc_drop={config.max_auc_drop}"
            )
    return tuple(reasons)


def gate(
    recipe: Recipe, evaluation: Path, current: PublishedModel | None, scratch: Path
) -> StageOutput:
    """Decide and write the decision; `current` is the model that would be replaced."""
    metrics = read_metrics(evaluation / METRICS_FILE)[recipe.gate.task]
    before = {} if current is None else read_metrics(current.directory / METRICS_FILE)
    reference = before[recipe.gate.task].auc if recipe.gate.task in before else None
    reasons = decide(recipe.gate, metrics, reference)
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

"""The gate: what a model must show before it is published.

Reads `evaluate/metrics.json`; writes `gate.json` and, where production was compared on the same
rows, its metrics (`pipeline.rival`).
"""

from pathlib import Path

from pipeline.config import Recipe
from pipeline.gate_config import TaskGate
from pipeline.gate_decision import GateDecision
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.rival import Rival
from pipeline.stages import StageOutput
from ranking.evaluation import TaskMetrics

GATE = "gate.json"
RANKING = ("auc", "gauc")
"""Metrics that have a rule min_NAME and a rule max_NAME_drop."""


def decide(
    rules: TaskGate, where: str, metrics: TaskMetrics, rival: Rival | None
) -> tuple[str, ...]:
    """Rules of a task that its metrics break, one sentence each; none means publish.

    Args:
        rules: of the task.
        where: path of the rules in the recipe.
        metrics: of the task.
        rival: the model that would be replaced; None: there is none.
    """
    few = _too_few(rules, where, metrics)
    if few is not None:  # no other figure says anything then
        return (few,)
    theirs = None if rival is None else rival.metrics.get(rules.task)
    reasons = []
    for name in RANKING:
        value, least = getattr(metrics, name), getattr(rules, f"min_{name}")
        if value is None:  # both classes are there, so auc is defined
            if rules.needs_gauc:
                reasons.append(
                    "gauc is not defined: no group (evaluation.group_by) has both classes"
                )
            continue
        if least is not None and value < least:
            reasons.append(f"{name} {value:.4f} is below {where}.min_{name}={least}")
        before, allowed = getattr(theirs, name, None), getattr(rules, f"max_{name}_drop")
        if rival and before is not None and allowed is not None and before - value > allowed:
            reasons.append(
                f"{name} fell by {before - value:.4f} against production, more than "
                f"{where}.max_{name}_drop={allowed} ({name} of {rival.date} {rival.rows})"
            )
    low, high = rules.calibration
    if metrics.calibration is None or not low <= metrics.calibration <= high:
        found = "(no label is 1)" if metrics.calibration is None else f"{metrics.calibration:.4f}"
        reasons.append(f"calibration {found} is outside {where}.calibration=[{low}, {high}]")
    return tuple(f"{rules.task}: {reason}" for reason in reasons)


def _too_few(rules: TaskGate, where: str, metrics: TaskMetrics) -> str | None:
    positives = metrics.num_positives
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


def gate(recipe: Recipe, evaluation: Path, rival: Rival | None, scratch: Path) -> StageOutput:
    """Decide and write the decision; `rival` is the model that would be replaced."""
    found = read_metrics(evaluation / METRICS_FILE)
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    for where, rules in recipe.gate.by_path:
        reasons += decide(rules, where, found[rules.task], rival)
        warnings += _not_compared(rules, rival)
    metrics = found[recipe.gate.task]
    decision = GateDecision(
        passed=not reasons,
        reasons=reasons,
        compared_with=None if rival is None else rival.date,
        compared=None if rival is None else rival.rows,
    )
    (scratch / GATE).write_text(decision.model_dump_json(indent=2))
    return StageOutput(metrics.num_rows, metrics.num_rows, decision, warnings=warnings)


def _not_compared(rules: TaskGate, rival: Rival | None) -> tuple[str, ...]:
    """Says that a rule of a task had nothing to compare with."""
    if rival is None:
        return ()
    theirs = rival.metrics.get(rules.task)
    return tuple(
        f"max_{name}_drop of task {rules.task} compares nothing: the model of {rival.date}, which "
        f"is in production, has no {name.upper()} of it"
        for name in RANKING
        if getattr(rules, f"max_{name}_drop") is not None and getattr(theirs, name, None) is None
    )

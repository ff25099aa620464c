"""The gate: what a model must show before it is published.

Reads `evaluate/metrics.json`; writes `gate.json` and, where production was compared on the same
rows, its metrics (`pipeline.rival`).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config import Recipe
from pipeline.gate_config import TaskGate
from pipeline.gate_decision import GateDecision, RuleCheck
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.rival import Rival
from pipeline.stages import StageOutput
from ranking.task_metrics import TaskMetrics

GATE = "gate.json"
RANKING = ("auc", "gauc")
"""Metrics that have a rule min_NAME and a rule max_NAME_drop."""


def check(
    rules: TaskGate, where: str, metrics: TaskMetrics, rival: Rival | None
) -> tuple[RuleCheck, ...]:
    """Each rule of a task against its metrics; a model is published where none is broken.

    Args:
        rules: of the task.
        where: path of the rules in the recipe.
        metrics: of the task.
        rival: the model that would be replaced; None: there is none.
    """
    counts = tuple(_count_checks(rules, where, metrics))
    too_few = [count for count in counts if count.reason is not None]
    if too_few:  # no other figure says anything then
        return (too_few[0],)
    return (
        *counts,
        *_ranking_checks(rules, where, metrics, rival),
        _calibration(rules, where, metrics),
    )


def reasons_of(checks: Iterable[RuleCheck]) -> tuple[str, ...]:
    """Sentences on the broken ones, each beginning with its task."""
    return tuple(f"{check.task}: {check.reason}" for check in checks if check.reason is not None)


def _count_checks(rules: TaskGate, where: str, metrics: TaskMetrics) -> Iterator[RuleCheck]:
    positives = metrics.num_positives
    counts = (
        ("evaluation rows", metrics.num_rows, "min_rows", rules.min_rows),
        ("evaluation rows with label 1", positives, "min_rows_per_class", rules.min_rows_per_class),
        (
            "evaluation rows with label 0",
            metrics.num_rows - positives,
            "min_rows_per_class",
            rules.min_rows_per_class,
        ),
    )
    for what, count, key, least in counts:
        reason = (
            f"{count} {what} are too few to judge a model by, fewer than {where}.{key}={least}; "
            "evaluate on more days (window.eval_days), or lower it"
        )
        yield RuleCheck(
            task=rules.task,
            rule=f"{where}.{key}",
            asked=f"at least {least:,}",
            found=f"{count:,} {what}",
            reason=reason if count < least else None,
        )


def _ranking_checks(
    rules: TaskGate, where: str, metrics: TaskMetrics, rival: Rival | None
) -> Iterator[RuleCheck]:
    theirs = None if rival is None else rival.metrics.get(rules.task)
    for name in RANKING:
        value, least = getattr(metrics, name), getattr(rules, f"min_{name}")
        if value is None:  # both classes are there, so auc is defined
            if rules.needs_gauc:
                yield RuleCheck(
                    task=rules.task,
                    rule=f"{where}.{f'max_{name}_drop' if least is None else f'min_{name}'}",
                    asked="a GAUC",
                    found="none",
                    reason="gauc is not defined: no group (evaluation.group_by) has both classes",
                )
            continue
        if least is not None:
            reason = f"{name} {value:.4f} is below {where}.min_{name}={least}"
            yield RuleCheck(
                task=rules.task,
                rule=f"{where}.min_{name}",
                asked=f"at least {least}",
                found=f"{value:.4f}",
                reason=reason if value < least else None,
            )
        before, allowed = getattr(theirs, name, None), getattr(rules, f"max_{name}_drop")
        if rival is not None and before is not None and allowed is not None:
            drop = before - value
            reason = (
                f"{name} fell by {drop:.4f} against production, more than "
                f"{where}.max_{name}_drop={allowed} ({name} of {rival.date} {rival.rows})"
            )
            yield RuleCheck(
                task=rules.task,
                rule=f"{where}.max_{name}_drop",
                asked=f"at most {allowed} below {rival.date}",
                found=f"{value:.4f} against {before:.4f} {rival.rows}",
                reason=reason if drop > allowed else None,
            )


def _calibration(rules: TaskGate, where: str, metrics: TaskMetrics) -> RuleCheck:
    low, high = rules.calibration
    value = metrics.calibration
    found = "(no label is 1)" if value is None else f"{value:.4f}"
    reason = f"calibration {found} is outside {where}.calibration=[{low}, {high}]"
    return RuleCheck(
        task=rules.task,
        rule=f"{where}.calibration",
        asked=f"{low} .. {high}",
        found=found,
        reason=reason if value is None or not low <= value <= high else None,
    )


def gate(recipe: Recipe, evaluation: Path, rival: Rival | None, scratch: Path) -> StageOutput:
    """Decide and write the decision; `rival` is the model that would be replaced."""
    found = read_metrics(evaluation / METRICS_FILE)
    checks: tuple[RuleCheck, ...] = ()
    warnings: tuple[str, ...] = ()
    for where, rules in recipe.gate.by_path:
        checks += check(rules, where, found[rules.task], rival)
        warnings += _not_compared(rules, rival)
    metrics = found[recipe.gate.task]
    reasons = reasons_of(checks)
    decision = GateDecision(
        passed=not reasons,
        reasons=reasons,
        checks=checks,
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

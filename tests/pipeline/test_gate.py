from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Recipe
from pipeline.gate import gate
from pipeline.gate_config import GateConfig
from pipeline.gate_decision import GateDecision
from pipeline.metrics_file import METRICS_FILE, write_metrics
from pipeline.rival import Rival
from ranking.task_metrics import TaskMetrics
from tests.pipeline.small_log import make_recipe

TASKS = [{"name": "click"}, {"name": "buy"}]


def of(auc: float | None = 0.7, **changes: Any) -> TaskMetrics:
    figures = {"num_rows": 1000, "num_positives": 100, "label_rate": 0.1, "auc": auc}
    return TaskMetrics.model_validate({**figures, "calibration": 1.0, **changes})


def folder(path: Path, **metrics: TaskMetrics) -> Path:
    path.mkdir(parents=True)
    write_metrics(metrics, path / METRICS_FILE)
    return path


def decide(
    tmp_path: Path,
    new: dict[str, TaskMetrics],
    old: dict[str, TaskMetrics] | None = None,
    **rules: Any,
) -> tuple[bool, str]:
    config = GateConfig.model_validate({"task": "click", "max_auc_drop": 0.02, **rules})
    recipe = make_recipe(tmp_path).model_copy(update={"gate": config})
    rival = None if old is None else Rival("2024-01-01", old, "on the same rows")
    scratch = tmp_path / "scratch"
    scratch.mkdir(parents=True)
    facts = gate(recipe, folder(tmp_path / "evaluate", **new), rival, scratch).facts
    assert isinstance(facts, GateDecision)
    return facts.passed, " ".join(facts.reasons)


def test_a_model_is_compared_with_the_one_in_production(tmp_path: Path) -> None:
    passed, reasons = decide(tmp_path, {"click": of(0.65)}, {"click": of(0.75)})

    assert not passed
    assert "auc fell by 0.1000" in reasons
    assert "(auc of 2024-01-01 on the same rows)" in reasons


def test_the_decision_holds_every_rule_with_what_was_found(tmp_path: Path) -> None:
    rules = {"task": "click", "min_auc": 0.6, "max_auc_drop": 0.02, "calibration": [0.8, 1.2]}
    recipe = make_recipe(tmp_path).model_copy(update={"gate": GateConfig.model_validate(rules)})
    rival = Rival("2024-01-01", {"click": of(0.71)}, "on the same rows")

    decision = gate(
        recipe, folder(tmp_path / "e", click=of(calibration=1.3)), rival, tmp_path
    ).facts

    assert isinstance(decision, GateDecision)
    assert [(c.rule, c.asked, c.found, c.reason is None) for c in decision.checks] == [
        ("gate.min_rows", "at least 1,000", "1,000 evaluation rows", True),
        ("gate.min_rows_per_class", "at least 100", "100 evaluation rows with label 1", True),
        ("gate.min_rows_per_class", "at least 100", "900 evaluation rows with label 0", True),
        ("gate.min_auc", "at least 0.6", "0.7000", True),
        (
            "gate.max_auc_drop",
            "at most 0.02 below 2024-01-01",
            "0.7000 against 0.7100 on the same rows",
            True,
        ),
        ("gate.calibration", "0.8 .. 1.2", "1.3000", False),
    ]
    assert decision.reasons == ("click: calibration 1.3000 is outside gate.calibration=[0.8, 1.2]",)


def test_gauc_has_rules_of_its_own(tmp_path: Path) -> None:
    rules = {"max_auc_drop": None, "min_gauc": 0.6, "max_gauc_drop": 0.05}
    old = {"click": of(gauc=0.7)}

    assert decide(tmp_path / "good", {"click": of(gauc=0.66)}, old, **rules) == (True, "")
    passed, reasons = decide(tmp_path / "worse", {"click": of(gauc=0.59)}, old, **rules)
    assert not passed
    assert "gauc 0.5900 is below gate.min_gauc=0.6" in reasons
    assert "gauc fell by 0.1100 against production, more than gate.max_gauc_drop=0.05" in reasons
    passed, reasons = decide(tmp_path / "none", {"click": of()}, old, **rules)
    assert not passed
    assert "gauc is not defined: no group (evaluation.group_by) has both classes" in reasons
    assert decide(tmp_path / "unasked", {"click": of()}, old) == (True, "")


def test_rows_are_counted_whatever_they_weigh(tmp_path: Path) -> None:
    """Negatives that were sampled at 1 in 20 weigh 20: the label rate is that of all rows."""
    sampled = of(num_rows=20_000, num_positives=991, label_rate=0.0026)
    assert decide(tmp_path / "sampled", {"click": sampled}) == (True, "")

    heavy = of(num_rows=2000, num_positives=5, label_rate=0.9)
    passed, reasons = decide(tmp_path / "heavy", {"click": heavy})
    assert not passed
    assert "5 evaluation rows with label 1 are too few" in reasons


def test_a_rule_that_finds_nothing_to_compare_with_says_so(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    rules = {"task": "click", "max_auc_drop": 0.02}
    recipe = recipe.model_copy(update={"gate": GateConfig.model_validate(rules)})
    evaluation = folder(tmp_path / "evaluate", click=of())
    for metrics in ({}, {"click": of(None)}):
        output = gate(recipe, evaluation, Rival("2024-01-01", metrics, "on some rows"), tmp_path)
        (warning,) = output.warnings
        assert "max_auc_drop of task click compares nothing: the model of 2024-01-01" in warning
    known = Rival("2024-01-01", {"click": of()}, "on some rows")
    assert not gate(recipe, evaluation, known, tmp_path).warnings


def test_a_small_drop_and_a_first_model_pass(tmp_path: Path) -> None:
    small = decide(tmp_path / "small", {"click": of(0.74)}, {"click": of(0.75)})
    assert small == (True, "")
    assert decide(tmp_path / "first", {"click": of(0.55)}) == (True, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_rows": 999}, "click: 999 evaluation rows are too few"),
        ({"num_rows": 0, "label_rate": None, "auc": None}, "click: 0 evaluation rows are too few"),
        ({"num_positives": 99}, "99 evaluation rows with label 1 are too few"),
        ({"num_positives": 901}, "99 evaluation rows with label 0 are too few"),
        ({"num_positives": 0, "auc": None}, "0 evaluation rows with label 1 are too few"),
    ],
)
def test_too_few_rows_to_judge_by_are_refused_with_the_remedy(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    passed, reasons = decide(tmp_path, {"click": of(**changes)})

    assert not passed
    assert reason in reasons
    assert "evaluate on more days (window.eval_days), or lower it" in reasons


def test_every_task_that_has_rules_must_keep_them(tmp_path: Path) -> None:
    rules = {"also": [{"task": "buy", "min_auc": 0.6, "max_auc_drop": 0.01, "min_rows": 500}]}
    good, new = (
        {"click": of(), "buy": of()},
        {"click": of(), "buy": of(0.55, num_rows=600, num_positives=60)},
    )

    assert decide(tmp_path / "good", good, good, **rules) == (True, "")
    passed, reasons = decide(tmp_path / "worse", new, good, **rules)
    assert not passed
    assert "buy: 60 evaluation rows with label 1" in reasons
    passed, reasons = decide(tmp_path / "bad", {**good, "buy": of(0.55)}, good, **rules)
    assert not passed
    assert "buy: auc 0.5500 is below gate.also.0.min_auc=0.6" in reasons
    assert "buy: auc fell by 0.1500 against production, more than gate.also.0.max" in reasons


@pytest.mark.parametrize(
    ("task", "fault"), [("invented", "is not among the tasks"), ("click", "has rules already")]
)
def test_rules_of_a_task_that_is_not_there_or_has_some_are_refused(
    tmp_path: Path, task: str, fault: str
) -> None:
    recipe = make_recipe(tmp_path).model_dump(mode="json")
    recipe["ranking"]["tasks"] = TASKS
    recipe["gate"]["also"] = [{"task": "buy"}, {"task": task}]

    with pytest.raises(ValueError, match=f"gate.also.1.task: '{task}' {fault}"):
        Recipe.model_validate(recipe)

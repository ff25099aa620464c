"""Models that learn the days they were judged by before they are published."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from deploy.app import main
from pipeline import catch_up, training_stages
from pipeline.artifacts import StageFacts, read_manifest
from pipeline.catch_up import objections
from pipeline.config import PublishConfig
from pipeline.gate_config import GateConfig, TaskGate
from pipeline.metrics_file import read_metrics
from pipeline.registry import promote, rollback
from pipeline.train_facts import CatchUpFacts, TrainFacts
from ranking.evaluation import evaluate_predictions
from ranking.task_metrics import TaskMetrics
from tests.one_process import in_one_process
from tests.pipeline import small_models, stage_facts
from tests.pipeline.small_log import DAYS, make_recipe, write_days_to_train_on, write_log_to_run
from tests.pipeline.test_run import ingested, joined, run_of, write_log, write_manifest


def metrics(probs: list[float]) -> TaskMetrics:
    return evaluate_predictions(
        labels=np.array([0, 1, 0, 1], np.float32),
        probs=np.array(probs),
        groups=np.array([1, 1, 2, 2]),
        slices={},
    )


RULES = GateConfig(
    task="click",
    min_rows=1,
    min_rows_per_class=1,
    also=(TaskGate(task="like", min_rows=1, min_rows_per_class=1, min_auc=0.9),),
)


def test_what_has_learned_its_rows_is_accepted() -> None:
    before = {"click": metrics([0.4, 0.6, 0.7, 0.5]), "like": metrics([0.3, 0.9, 0.4, 0.6])}
    after = {"click": metrics([0.3, 0.7, 0.6, 0.5]), "like": metrics([0.2, 0.9, 0.3, 0.7])}

    assert objections(RULES, before, after) == ()


def test_what_got_worse_on_the_rows_it_learned_is_not() -> None:
    # Of four pairs of a positive and a negative three are in order before, and two after.
    before = {"click": metrics([0.4, 0.6, 0.55, 0.5]), "like": metrics([0.3, 0.9, 0.4, 0.6])}
    after = {"click": metrics([0.45, 0.6, 0.7, 0.5]), "like": metrics([0.1, 0.2, 0.15, 0.15])}

    assert objections(RULES, before, after) == (
        "click: auc on the rows it has learned fell from 0.7500 to 0.5000",
        "like: auc 0.8750 is below gate.also.0.min_auc=0.9",
        "like: calibration 0.3000 is outside gate.also.0.calibration=[0.5, 2.0]",
        "like: auc on the rows it has learned fell from 1.0000 to 0.8750",
        "like: gauc on the rows it has learned fell from 1.0000 to 0.7500",
    )


def test_the_next_day_takes_the_training_over_whatever_plan_it_ran_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 3)
    first = run_of(root, 0)
    first.recipe = first.recipe.model_copy(update={"publish": PublishConfig(catch_up=True)})
    ingested(first)
    joined(first)
    small_models.write_model(out, DAYS[0])
    small_models.write_manifest(out / DAYS[0] / "plan", "one plan", StageFacts())
    (spec,) = first.specs("catch_up")
    trained = CatchUpFacts(
        result=stage_facts.RESULT,
        days=(DAYS[1],),
        codebooks=None,
        event_columns={},
        accepted=True,
        reasons=(),
    )
    write_manifest(spec, trained)
    second = run_of(root, 1)
    ingested(second)
    joined(second)
    small_models.write_manifest(out / DAYS[1] / "plan", "another plan", StageFacts())
    monkeypatch.setattr(training_stages, "take_over", lambda *_: stage_facts.RESULT)

    (spec,) = second.specs("train")
    found = spec.body(tmp_path / "scratch").facts
    assert isinstance(found, TrainFacts)
    caught_up = read_manifest(first.directory("catch_up"))
    assert caught_up is not None
    assert found.caught_up == caught_up.artifact_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two days that were run with the option and, elsewhere, without; two more to evaluate on."""
    folder = tmp_path_factory.mktemp("catch_up")
    write_log_to_run(folder, 4, max_auc_drop=1.0)
    with in_one_process():
        for day in range(2):
            assert run(folder / "ahead", day) == 0
            assert run(folder / "behind", day, "publish.catch_up=false") == 0
        yield folder


def run(out: Path, day: int, *settings: str) -> int:
    words = ["--recipe", str(out.parent / "small.yaml"), "--date", DAYS[day], "--out", str(out)]
    overrides = [f"--set={setting}" for setting in ("publish.catch_up=true", *settings)]
    return main(["run", *words, *overrides])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def facts(out: Path, day: int, stage: str) -> Any:
    return read_json(out / DAYS[day] / stage / "manifest.json")["facts"]


def weights(bundle: Path) -> dict[str, np.ndarray]:
    found = {path.name: load_file(path) for path in bundle.rglob("*.safetensors")}
    return {f"{file}/{key}": value for file, group in found.items() for key, value in group.items()}


@pytest.mark.integration
def test_what_is_published_is_what_the_next_day_would_have_trained(folder: Path) -> None:
    ahead = weights(folder / "ahead" / DAYS[0] / "publish" / "bundle")
    next_day = weights(folder / "behind" / DAYS[1] / "publish" / "bundle")
    same_day = weights(folder / "behind" / DAYS[0] / "publish" / "bundle")

    assert ahead.keys() == next_day.keys()
    for key, value in next_day.items():
        np.testing.assert_allclose(ahead[key], value, atol=1e-6, err_msg=key)
    assert any(not np.allclose(ahead[key], value, atol=1e-4) for key, value in same_day.items())


@pytest.mark.integration
def test_a_model_is_judged_before_it_learns_the_rows(folder: Path) -> None:
    ahead, behind = (
        read_metrics(folder / out / DAYS[1] / "evaluate" / "metrics.json")["click"].auc
        for out in ("ahead", "behind")
    )
    assert ahead == pytest.approx(behind, abs=1e-6)
    published = read_metrics(folder / "ahead" / DAYS[1] / "publish" / "metrics.json")
    assert published["click"].auc == ahead


@pytest.mark.integration
def test_the_next_day_takes_the_training_over(folder: Path) -> None:
    caught_up, trained = facts(folder / "ahead", 0, "catch_up"), facts(folder / "ahead", 1, "train")
    plain = facts(folder / "behind", 1, "train")

    assert caught_up["days"] == trained["days"] == [DAYS[1]]
    assert trained["parent"] == DAYS[0]
    assert trained["result"] == caught_up["result"], "it was not trained again"
    assert trained["caught_up"] is not None
    assert plain["caught_up"] is None
    decision = read_json(folder / "ahead" / DAYS[1] / "gate" / "gate.json")
    assert decision["compared"] == "on the same rows: it is this very model"
    summary = read_json(folder / "ahead" / DAYS[1] / "summary.json")
    assert summary["catch_up"] == {"days": [DAYS[2]], "accepted": True, "reasons": []}


@pytest.mark.integration
def test_production_that_has_seen_the_rows_is_compared_as_it_was_before(folder: Path) -> None:
    out = folder / "two"
    for day in range(2):
        assert run(out, day, "window.eval_days=2") == 0
    decided = read_json(out / DAYS[1] / "gate" / "gate.json")
    assert decided["compared"] == "on the same rows, before it caught up"
    theirs = read_metrics(out / DAYS[1] / "gate" / "production" / "metrics.json")
    assert theirs["click"].num_rows == 180
    assert facts(out, 1, "train")["caught_up"] is None, "it has learned other days"


@pytest.mark.integration
def test_another_gate_judges_again_and_trains_nothing(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "ahead", folder / "judged"))
    before = facts(out, 1, "catch_up")

    assert run(out, 1, "gate.min_auc=0.01") == 0
    assert facts(out, 1, "catch_up") == before
    said = read_json(out / DAYS[1] / "summary.json")["stages"]["catch_up"]["status"]
    assert said == "ran"


@pytest.mark.integration
@pytest.mark.parametrize("why", ["withdrawn", "damaged"])
def test_what_is_not_to_be_built_on_is_not_taken_over(folder: Path, why: str) -> None:
    out = Path(shutil.copytree(folder / "ahead", folder / why))
    if why == "damaged":
        next((out / DAYS[1] / "catch_up").rglob("*.distcp")).unlink()
    else:
        rollback(out)  # what has caught up is bad, and the model of that day is put in its place
        assert run(out, 1, "publish.catch_up=false") == 0
        promote(out, DAYS[1])

    assert run(out, 2) == 0
    trained = facts(out, 2, "train")
    assert (trained["parent"], trained["days"]) == (DAYS[1], [DAYS[2]])
    assert trained["caught_up"] is None


@pytest.mark.integration
def test_a_training_that_went_wrong_leaves_the_model_of_the_gate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catch_up, "TOLERANCE", -1.0)
    out = folder / "wrong"

    assert run(out, 0) == 0
    published, plain = (
        weights(folder / name / DAYS[0] / "publish" / "bundle") for name in ("wrong", "behind")
    )
    for key, value in plain.items():
        np.testing.assert_allclose(published[key], value, atol=1e-6, err_msg=key)
    summary = read_json(out / DAYS[0] / "summary.json")
    assert summary["catch_up"]["accepted"] is False
    assert summary["warnings"][-1].startswith("catch_up is not published, but the model of")
    assert "auc on the rows it has learned fell" in " ".join(capsys.readouterr().out.split())
    assert main(["status", "--out", str(out)]) == 0


@pytest.mark.integration
def test_export_writes_what_is_published(folder: Path, tmp_path: Path) -> None:
    out = folder / "ahead"
    to = ["--date", DAYS[0], "--out", str(out), "--to", str(tmp_path / "bundle")]
    assert main(["export", *to]) == 0
    exported, published = (
        weights(path) for path in (tmp_path / "bundle", out / DAYS[0] / "publish" / "bundle")
    )
    assert exported.keys() == published.keys()
    for key, value in published.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)


@pytest.mark.parametrize(
    "settings",
    [
        ("window.warm_start=false", "evaluation.held_out_items={}"),
        ("window.validation_days=1",),
    ],
)
def test_it_is_refused_where_days_or_items_are_kept_from_training(
    settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--set={setting}" for setting in ("publish.catch_up=true", *settings)]
    assert main(["validate", "--recipe", "demo", *words]) == 2
    assert "set one of the two" in " ".join(capsys.readouterr().err.split())


def test_its_stage_needs_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_days_to_train_on(tmp_path / "data", 2)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path / "data").model_dump(mode="json")))
    words = ["--recipe", str(recipe), "--date", DAYS[0], "--out", str(tmp_path / "out")]

    assert main(["stage", "catch_up", *words]) == 2
    assert "publish.catch_up is false; set it" in " ".join(capsys.readouterr().err.split())

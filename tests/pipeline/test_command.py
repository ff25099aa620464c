"""What `backfill` checks before it runs anything, and what a finished run says and promotes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedding.errors import UserError
from multimodal.content_config import ContentConfig
from pipeline import command as command_module
from pipeline.artifacts import Manifest, StageFacts, publish, writing
from pipeline.command import Command
from pipeline.config import PublishConfig, Recipe
from pipeline.metrics_file import METRICS_FILE, write_metrics
from pipeline.recipe import load_recipe
from pipeline.registry import production, rollback
from pipeline.run import DayRun
from pipeline.stages import StageRecord
from pipeline.summary import Summary
from ranking.task_metrics import TaskMetrics
from tests.multimodal.small_models import IMAGE_SIZE, save_image_model
from tests.pipeline.small_log import DAYS, make_recipe
from tests.pipeline.stage_facts import decided, published, trained


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Days without content, and a run that must not happen."""
    for day in DAYS:
        (tmp_path / "data" / "events" / f"dt={day}").mkdir(parents=True)

    def run(_: Command, date: str) -> Any:
        raise AssertionError(date)

    monkeypatch.setattr(Command, "_run", run)
    return Command(make_recipe(tmp_path / "data"), tmp_path / "out", publish=lambda *_: None)


def test_backfill_up_to_the_last_day_is_refused_before_the_first_is_run(command: Command) -> None:
    with pytest.raises(UserError, match=rf"{DAYS[3]}: no later day.*can be run is {DAYS[2]}"):
        command.run_days(DAYS[0], DAYS[3])


def test_backfill_runs_the_days_that_have_a_later_one(command: Command) -> None:
    with pytest.raises(AssertionError, match=DAYS[0]):
        command.run_days(DAYS[0], DAYS[2])


def test_backfill_of_days_that_are_not_there_names_those_that_are(command: Command) -> None:
    with pytest.raises(UserError, match=rf"no such day \(it has {DAYS[0]} .. {DAYS[-1]}\)"):
        command.run_days("2025-01-01", "2025-01-02")


def test_backfill_does_not_pass_over_a_day_that_is_not_complete(command: Command) -> None:
    data = command.recipe.data.model_copy(update={"complete_marker": "_SUCCESS"})
    command.recipe = command.recipe.model_copy(update={"data": data})
    for day in (DAYS[0], DAYS[2], DAYS[3]):
        (data.root / "events" / f"dt={day}" / "_SUCCESS").touch()

    with pytest.raises(UserError, match=rf"{DAYS[1]}: .*holds no file _SUCCESS"):
        command.run_days(DAYS[0], DAYS[2])
    with pytest.raises(AssertionError, match=DAYS[2]):
        command.run_days(DAYS[2], DAYS[2])


def test_a_model_that_is_passed_over_is_in_the_record_of_the_command(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "passed_over", lambda *_: iter(["it is cut off"]))
    for day in DAYS[:2]:
        command._day(day)
    assert command.progress.warnings == tuple(f"{day}: it is cut off" for day in DAYS[:2])


def test_a_tower_in_a_relative_directory_is_refused_on_a_cluster_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have working directories of their own, and would take its name for a hub id."""
    monkeypatch.chdir(tmp_path)
    model = save_image_model(Path("models/image"))
    towers = {"image": {"model": model, "image_size": IMAGE_SIZE}}
    recipe = make_recipe(tmp_path / "data")
    recipe = recipe.model_copy(update={"content": ContentConfig.model_validate(towers)})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Command(recipe, tmp_path / "out", publish=lambda *_: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match=r"^content\.image\.model=models/image is relative, and"):
        Command(recipe, tmp_path / "out", publish=lambda *_: None)
    towers["image"]["model"] = str(tmp_path / model)
    recipe = recipe.model_copy(update={"content": ContentConfig.model_validate(towers)})
    Command(recipe, tmp_path / "out", publish=lambda *_: None)


# --- runs whose stages are current ---------------------------------------------------------------


def write_artifacts(out: Path, date: str, auc: float, *, passed: bool) -> list[StageRecord]:
    """Artifacts from train on, whose ids follow from the metric."""
    facts: dict[str, StageFacts] = {
        "train": trained([date]),
        "evaluate": StageFacts(),
        "gate": decided() if passed else decided("ctr[/x]: auc [0.5] is too low"),
        **({"publish": published(date)} if passed else {}),
    }
    records = []
    for stage, values in facts.items():
        directory, identity = out / date / stage, f"{stage}-{date}-{auc}"
        inputs = {"train": f"train-{date}-{auc}"}
        manifest = Manifest(
            stage=stage, artifact_id=identity, config_hash="", inputs=inputs, facts=values
        )
        with writing(directory, identity) as scratch:
            metrics = {"click": TaskMetrics(num_rows=9, num_positives=4, auc=auc)}
            write_metrics(metrics, scratch / METRICS_FILE)
            publish(scratch, directory, manifest)
        records.append(StageRecord(stage, "current", manifest))
    return records


Run = Callable[..., Summary]


@pytest.fixture
def run_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a date whose artifacts are all there."""
    for day in DAYS:
        (tmp_path / "data" / "events" / f"dt={day}").mkdir(parents=True)
    recipe, out = make_recipe(tmp_path / "data"), tmp_path / "out"

    def write_report(recipe: Recipe, summary: Summary, directory: Path) -> None:
        (directory / "report.html").touch()

    def run(date: str, auc: float = 0.6, *, passed: bool = True, promote: bool = True) -> Summary:
        records = write_artifacts(out, date, auc, passed=passed)
        monkeypatch.setattr(DayRun, "execute", lambda _: records)
        settings = recipe.model_copy(update={"publish": PublishConfig(promote=promote)})
        return Command(settings, out, publish=lambda *_: None)._run(date)

    monkeypatch.setattr(command_module, "write_report", write_report)
    return run


def test_the_summary_of_earlier_artifacts_is_not_taken_for_that_of_a_run(
    run_date: Run, tmp_path: Path
) -> None:
    """A process that is killed before it writes its summary leaves that of an earlier model."""
    run_date(DAYS[0], 0.6, passed=False)
    written = tmp_path / "out" / DAYS[0] / "summary.json"
    before = written.stat().st_mtime_ns

    assert run_date(DAYS[0], 0.6, passed=False).eval["click"].auc == 0.6
    assert written.stat().st_mtime_ns == before, "nothing changed"
    assert run_date(DAYS[0], 0.7, passed=False).eval["click"].auc == 0.7
    assert '"auc": 0.7' in written.read_text()


def test_a_model_that_is_passed_over_is_in_the_summary_as_long_as_it_is_one(
    run_date: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "out" / DAYS[0] / "summary.json"
    assert run_date(DAYS[0], passed=False).warnings == []
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "passed_over", lambda *_: iter(["it is cut off"]))
        assert run_date(DAYS[0], passed=False).warnings == ["it is cut off"]
        assert '"warnings": [\n    "it is cut off"' in written.read_text()
    assert run_date(DAYS[0], passed=False).warnings == []


def test_the_model_of_an_older_day_replaces_no_newer_one(
    run_date: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for date in (DAYS[0], DAYS[2]):
        run_date(date)
        assert production(out).date == date
    assert "not promoted" not in capsys.readouterr().out

    assert run_date(DAYS[1]).warnings == [
        f"published, not promoted: production is of {DAYS[2]}; `braid models promote --out {out} "
        f"--date {DAYS[1]}` changes that"
    ]
    said = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere
    remedy = f"`braid models promote --out {out} --date {DAYS[1]}` changes that"
    assert f"not promoted: production is of {DAYS[2]}; {remedy}".replace(" ", "") in said
    assert production(out).date == DAYS[2]

    assert run_date(DAYS[0]).warnings == [], "it was in production before"
    assert f"not promoted again: production is of {DAYS[2]}" in capsys.readouterr().out

    rollback(out)
    run_date(DAYS[1], 0.7)
    assert production(out).date == DAYS[1], "newer than what the rollback returned to"
    (warning,) = run_date(DAYS[2]).warnings
    assert warning.startswith("published, not promoted: it was withdrawn from production")
    assert production(out).date == DAYS[1], "rolled back on purpose"
    run_date(DAYS[2], 0.7)
    assert production(out).date == DAYS[2]


def test_a_model_that_is_to_be_tried_first_is_published_and_not_promoted(
    run_date: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_date(DAYS[0])
    assert run_date(DAYS[1], promote=False).warnings == [], "that is what was asked for"
    assert production(tmp_path / "out").date == DAYS[0]
    assert "not promoted: publish.promote is false" in capsys.readouterr().out

    run_date(DAYS[1])
    assert production(tmp_path / "out").date == DAYS[1]


def test_reasons_of_a_gate_are_shown_as_they_are(
    run_date: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run_date(DAYS[0], passed=False)
    monkeypatch.setattr(Command, "_run", lambda *_: summary)
    command = Command(load_recipe("demo"), Path("out[/x]"), publish=lambda *_: None)

    assert command.run_day(DAYS[0])
    said = " ".join(capsys.readouterr().out.split())
    assert f"gate refused {DAYS[0]}: ctr[/x]: auc [0.5] is too low" in said
    assert f"report out[/x]/{DAYS[0]}/report.html" in said

"""What is pruned, and that nothing of it is missed: by a run again, a next run, or a rollback."""

import errno
import os
import shutil
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.app import main
from embedding.errors import UserError
from pipeline import lock
from pipeline.artifacts import MANIFEST, StageFacts, read_manifest
from pipeline.command import Command
from pipeline.config import WindowConfig
from pipeline.console import Reporter
from pipeline.lineage import next_parent
from pipeline.lock import changing, exclusive
from pipeline.prune import ASIDE, Prunable, freed_bytes, prunable, set_aside
from pipeline.pruned import PRUNED
from pipeline.recipe import write_recipe
from pipeline.registry import PRODUCTION, production, promote, rollback
from pipeline.reports.report import REPORT
from pipeline.run import DayRun
from pipeline.stages import STAGES
from pipeline.status import output_status
from pipeline.summary import SUMMARY
from tests.pipeline.small_log import make_recipe, write_catalogue
from tests.pipeline.stage_facts import decided, published, trained
from tests.pipeline.test_run import changed, ingested, joined, write_manifest

NUM_RUNS = 6
DAYS = [str(date(2024, 1, 1) + timedelta(i)) for i in range(NUM_RUNS + 2)]


def run_of(folder: Path, day: int, **window: Any) -> DayRun:
    recipe = make_recipe(folder / "data").model_copy(update={"window": WindowConfig(**window)})
    out = folder / "out"
    return DayRun(
        recipe, out, DAYS[day], session=None, reporter=Reporter(), publish=lambda *_: None
    )


def run_day(
    folder: Path, day: int, *, passed: bool = True, promoted: bool = True, **window: Any
) -> None:
    """As if a day had been run, published and promoted; every artifact has a file of its own."""
    run = run_of(folder, day, **window)
    ingested(run)
    joined(run)
    facts: dict[str, StageFacts] = {
        "plan": StageFacts(),
        "train": trained(run.training_days(), run.parent),
        "evaluate": StageFacts(),
        "gate": decided() if passed else decided("it is bad"),
        **({"publish": published(DAYS[day])} if passed else {}),
    }
    for stage, values in facts.items():
        (spec,) = run.specs(stage)
        write_manifest(spec, values)
        (spec.directory / "file").write_bytes(b"x" * 1000)
    write_recipe(run.recipe, run.out / run.date)
    if passed and promoted:
        promote(run.out, run.date)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log whose files nobody reads."""
    write_catalogue(tmp_path / "data")
    for day in DAYS:
        events = tmp_path / "data" / "events" / f"dt={day}"
        events.mkdir(parents=True)
        (events / "part-00000.parquet").write_text(day)
    return tmp_path


def stages_left(out: Path) -> dict[str, set[str]]:
    return {
        day: {path.parent.name for path in (out / day).glob("*/manifest.json")}
        for day in DAYS
        if list((out / day).glob("*/manifest.json"))
    }


def is_current(folder: Path, day: int, **window: Any) -> bool:
    run = run_of(folder, day, **window)
    return all(spec.is_current for stage in STAGES for spec in run.specs(stage))


def prune(folder: Path, keep: int, *options: str) -> None:
    assert main(["prune", "--out", str(folder / "out"), "--keep", str(keep), *options]) == 0


def test_the_latest_runs_stay_current_and_the_next_one_starts_as_it_would_have(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    out, latest = folder / "out", NUM_RUNS - 1
    before = run_of(folder, NUM_RUNS)
    prune(folder, 2)

    left = stages_left(out)
    whole = {"ingest", "join", "plan", "train", "evaluate", "gate", "publish"}
    assert left == {
        DAYS[latest - 2]: whole - {"ingest", "join"},
        DAYS[latest - 1]: whole,
        DAYS[latest]: whole,
        DAYS[latest + 1]: {"ingest", "join"},
    }
    assert is_current(folder, latest)
    assert is_current(folder, latest - 1)
    after = run_of(folder, NUM_RUNS)
    assert after.parent == before.parent == DAYS[latest]
    assert after.training_days() == before.training_days() == (DAYS[NUM_RUNS],)
    assert [day for day, current in ingested(after) if not current] == [DAYS[NUM_RUNS + 1]]
    assert rollback(out).date == DAYS[latest - 1]
    assert next_parent(out) == DAYS[latest - 1]
    assert main(["status", "--out", str(out)]) == 0
    capsys.readouterr()
    prune(folder, 2)
    assert "nothing to delete" in capsys.readouterr().out


def test_status_says_what_is_kept_of_runs_that_were_pruned(folder: Path) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    out, latest = folder / "out", NUM_RUNS - 1
    prune(folder, 1)
    prune(folder, 1)

    found = {run.date: run for run in output_status(out, lambda *_: None).runs}
    assert list(found) == DAYS[:NUM_RUNS]
    for day in DAYS[:latest]:
        assert (found[day].problem, found[day].stages) == (None, ())
        kept = "there is nothing to run again" if day == DAYS[latest - 1] else "figures are kept"
        assert kept in found[day].pruned
    assert found[DAYS[latest]].pruned is None
    assert {stage.state for stage in found[DAYS[latest]].stages} == {"current"}

    run = run_of(folder, latest - 1)
    Command(run.recipe, out, publish=run.publish)._write_recipe(run.date)
    shown = {run.date: run for run in output_status(out, lambda *_: None).runs}[run.date]
    assert shown.pruned is None
    assert shown.stages, "it is run again"


def test_what_a_dry_run_names_is_what_is_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    out = folder / "out"
    found = prunable(out, 1)
    before = stages_left(out)
    with exclusive(out, "braid run"):
        prune(folder, 1, "--dry-run")
        said = capsys.readouterr().out
        assert main(["prune", "--out", str(out), "--keep", "1"]) == 2
    assert stages_left(out) == before
    assert "would free" in said
    rows = [line for line in said.splitlines() if "iB " in line]
    assert len(rows) == len(found)
    for entry in found:
        assert [row for row in rows if f" {entry.what} " in row], entry

    capsys.readouterr()
    prune(folder, 1)
    assert not [path for entry in found for path in entry.paths if path.exists()]
    assert production(out).directory.is_dir()


def test_models_that_were_refused_or_taken_back_do_not_push_out_the_last_good_one(
    folder: Path,
) -> None:
    run_day(folder, 0)
    run_day(folder, 1)
    for day in range(2, NUM_RUNS):
        run_day(folder, day, passed=False)
    rollback(folder / "out")
    before = run_of(folder, NUM_RUNS)
    prune(folder, 1)

    after = run_of(folder, NUM_RUNS)
    assert after.parent == before.parent == DAYS[0]
    assert after.training_days() == before.training_days() == tuple(DAYS[1 : NUM_RUNS + 1])
    stale = [day for day, current in ingested(after) if not current]
    assert stale == [DAYS[NUM_RUNS + 1]], "samples of all days since are there"


@pytest.mark.parametrize(("train_days", "first"), [(None, 0), (3, NUM_RUNS - 3)])
def test_samples_of_the_window_stay_where_each_run_trains_on_all_of_it(
    folder: Path, train_days: int | None, first: int
) -> None:
    window = {"warm_start": False, "train_days": train_days}
    for day in range(NUM_RUNS):
        run_day(folder, day, **window)
    out = folder / "out"
    prune(folder, 1)

    left = stages_left(out)
    assert [day for day, stages in left.items() if "join" in stages] == DAYS[first : NUM_RUNS + 1]
    trained = [day for day, stages in left.items() if "train" in stages]
    assert trained == DAYS[NUM_RUNS - 2 : NUM_RUNS], "the last one, and what a rollback returns to"
    assert is_current(folder, NUM_RUNS - 1, **window)


def test_bundles_that_may_be_promoted_yet_have_entries_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day, passed=day != 3, promoted=day > 3)
    out = folder / "out"
    prune(folder, 2)

    said = capsys.readouterr().out
    assert f"kept: published, never promoted, of {DAYS[1]}, {DAYS[2]}\n" in said
    row = next(line for line in said.splitlines() if f"{DAYS[0]}/publish " in line)
    assert "published, never promoted, and not among the latest that may be" in row
    trained = [day for day, stages in stages_left(out).items() if "train" in stages]
    assert trained == [DAYS[1], DAYS[2], DAYS[4], DAYS[5]]
    assert promote(out, DAYS[2]).date == DAYS[2]
    assert next_parent(out) == DAYS[2]


def test_figures_of_every_run_stay(folder: Path) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
        for name in (SUMMARY, REPORT):
            (folder / "out" / DAYS[day] / name).write_text("figures")
    prune(folder, 1)

    assert stages_left(folder / "out").get(DAYS[0]) is None
    for day in DAYS[:NUM_RUNS]:
        left = {path.name for path in (folder / "out" / day).iterdir()}
        assert {"recipe.yaml", SUMMARY, REPORT} <= left


def test_a_backfill_of_old_dates_stays_as_long_as_it_was_made_of_late(folder: Path) -> None:
    window = {"train_days": 1, "eval_days": 1}
    for made, day in enumerate((2, 3, 4, 5, 0)):
        run_day(folder, day, promoted=day > 0, **window)
        for path in (folder / "out" / DAYS[day]).glob(f"*/{MANIFEST}"):
            manifest = read_manifest(path.parent).model_copy(update={"created_at": str(made)})
            path.write_text(manifest.model_dump_json())
    prune(folder, 1)
    samples = {day for day, stages in stages_left(folder / "out").items() if "join" in stages}
    assert samples == {*DAYS[:3], *DAYS[5:7]}, "the third holds those before it, too"
    assert all(is_current(folder, day, **window) for day in (0, 5))

    for path in (folder / "out").glob(f"????-??-??/*/{MANIFEST}"):
        manifest = read_manifest(path.parent).model_copy(update={"created_at": ""})
        path.write_text(manifest.model_dump_json())
    prune(folder, 1)
    assert set(stages_left(folder / "out")) == {DAYS[0], *DAYS[4:7]}, "one may be promoted yet"


def test_samples_of_old_models_in_production_are_not_kept(folder: Path) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day, promoted=day < 2)
    out = folder / "out"
    prune(folder, 2)

    left = stages_left(out)
    assert [day for day, stages in left.items() if "join" in stages] == DAYS[NUM_RUNS - 2 : -1]
    assert all({"train", "gate", "publish"} <= left[day] for day in DAYS[:2])
    assert production(out).date == DAYS[1]
    assert rollback(out).date == DAYS[0]


def test_unfinished_work_stays_where_a_run_may_go_on_with_it(folder: Path) -> None:
    for day in range(3):
        run_day(folder, day)
    out = folder / "out"
    for day in (1, 2):
        for kind in ("partial", "abandoned"):
            (out / DAYS[day] / f".train.{kind}" / "resume").mkdir(parents=True)
    prune(folder, 1)

    left = sorted(str(path.relative_to(out)) for path in out.glob("*/.train.*"))
    assert left == [f"{DAYS[2]}/.train.partial"]


def test_what_a_crash_interrupted_as_it_was_published_is_no_leftover(folder: Path) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    latest, out = NUM_RUNS - 1, folder / "out"
    start = out / DAYS[latest - 1]
    (start / "train").rename(start / ".train.partial")
    (start / ".train.outdated").mkdir()
    (out / DAYS[latest] / "ingest").rename(out / DAYS[latest] / ".ingest.outdated")
    assert not {entry.what for entry in prunable(out, 1)} & {
        str(start / ".train.partial"),
        str(out / DAYS[latest] / ".ingest.outdated"),
    }
    prune(folder, 1)

    assert is_current(folder, latest)
    assert "train" in stages_left(out)[DAYS[latest - 1]]
    assert not [*out.glob("*/.train.*"), *out.glob("*/.ingest.*")]


def test_models_stay_as_far_as_rollbacks_go_and_gates_compare(folder: Path) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    out = folder / "out"
    prune(folder, 3)

    assert len(list((out / "models").iterdir())) == 4, (
        "the gate of the third compares with one more"
    )
    assert [rollback(out).date for _ in range(2)] == [DAYS[NUM_RUNS - 2], DAYS[NUM_RUNS - 3]]


@pytest.mark.parametrize("change", ["settings", "a lost artifact", "a larger window"])
def test_histories_are_not_cut_because_pruned_artifacts_no_longer_tell_of_them(
    folder: Path, change: str
) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day, train_days=2)
    prune(folder, 1)
    events = folder / "data" / "events"
    for day in DAYS[:3]:
        shutil.rmtree(events / f"dt={day}")
    assert all(current for _, current in ingested(run_of(folder, NUM_RUNS - 1, train_days=2)))

    first = min(day for day, stages in stages_left(folder / "out").items() if "ingest" in stages)
    window = {"train_days": 2}
    (events / f"dt={first}" / "part-00001.parquet").write_text("late")
    assert all(current for _, current in ingested(run_of(folder, NUM_RUNS - 1, train_days=2)))
    if change == "a lost artifact":
        shutil.rmtree(folder / "out" / first / "ingest")
    elif change == "a larger window":
        window = {"train_days": 5, "warm_start": False}
    run = run_of(folder, NUM_RUNS - 1, **window)
    if change == "settings":
        run = changed(run)
    with pytest.raises(UserError, match=f"go back to {DAYS[0]}, .*--shorter-histories"):
        ingested(run)


def test_nothing_changes_production_while_it_is_decided_what_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in range(3):
        run_day(folder, day)
    out = folder / "out"
    before = stages_left(out)
    monkeypatch.setattr(lock, "CHANGE_TIMEOUT_S", 0.1)
    with changing(out / PRODUCTION):
        assert main(["prune", "--out", str(out), "--keep", "1"]) == 2
    assert "held by another process" in capsys.readouterr().err
    assert stages_left(out) == before

    monkeypatch.setattr(shutil, "rmtree", lambda _: promote(out, DAYS[2]))
    prune(folder, 1)
    assert stages_left(out) != before, "production can be changed while files are deleted"


def test_what_an_interrupted_prune_has_left_is_deleted_by_the_next(folder: Path) -> None:
    for day in range(3):
        run_day(folder, day)
    out = folder / "out"
    set_aside(out, 1)
    assert list(out.glob(f"{ASIDE}*"))

    prune(folder, 1)
    assert not list(out.glob(f"{ASIDE}*"))


def test_a_full_disk_is_pruned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for day in range(NUM_RUNS):
        run_day(folder, day)
    out, is_full = folder / "out", True
    mkdir, open_file, rmtree = os.mkdir, Path.open, shutil.rmtree

    def no_room(path: object) -> None:
        if is_full and not Path(str(path)).exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def full_mkdir(path: Any, *options: Any, **more: Any) -> None:
        no_room(path)
        mkdir(path, *options, **more)

    def full_open(self: Path, mode: str = "r", *options: Any, **more: Any) -> Any:
        if "w" in mode:
            no_room(self)
        return open_file(self, mode, *options, **more)

    def freeing(path: Path) -> None:
        nonlocal is_full
        rmtree(path)
        is_full = False

    monkeypatch.setattr(os, "mkdir", full_mkdir)
    monkeypatch.setattr(Path, "open", full_open)
    monkeypatch.setattr(shutil, "rmtree", freeing)
    prune(folder, 1)

    assert set(stages_left(out)) == set(DAYS[NUM_RUNS - 2 : NUM_RUNS + 1])
    assert not list(out.glob(f"{ASIDE}*"))
    assert ".owner.json could not be written: [Errno 28]" in caplog.text
    assert all((out / day / PRUNED).exists() for day in DAYS[: NUM_RUNS - 1]), "noted in the end"


def test_a_run_that_cannot_be_noted_as_pruned_is_pruned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for day in range(3):
        run_day(folder, day)
    out = folder / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    prune(folder, 1)
    assert DAYS[0] not in stages_left(out)
    assert f"{out / DAYS[0]} is not noted as pruned: [Errno 28]" in caplog.text


def test_files_that_keep_another_name_free_nothing(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    (one / "file").write_bytes(b"x" * 1000)
    os.link(one / "file", two / "file")
    first, second = (Prunable(str(path), (path,), "") for path in (one, two))

    assert (first.num_bytes, freed_bytes([first])) == (1000, 0)
    assert freed_bytes([first, second]) == 1000


def test_a_directory_without_runs_loses_nothing(tmp_path: Path) -> None:
    assert prunable(tmp_path, 1) == []
    assert main(["prune", "--out", str(tmp_path / "typo")]) == 2

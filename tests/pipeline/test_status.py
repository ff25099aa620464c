"""What `braid status` shows of dates that cannot be looked into, and of failures."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from deploy.app import main
from pipeline.lock import LOCK, OWNER, exclusive, holder, this_process
from pipeline.recipe import RECIPE_FILE, write_recipe
from pipeline.stages import Failure, failure_file, running_file
from pipeline.status import output_status, status_table
from tests.pipeline.small_log import DAYS, event, make_recipe, write_catalogue, write_day


def write_runs(folder: Path, num_dates: int) -> Path:
    """An output directory where so many dates have a recipe and nothing else."""
    root, out = folder / "data", folder / "out"
    write_catalogue(root)
    for day in range(4):
        write_day(root, day, [[event(day, 1, 60)]])
    for date in DAYS[:num_dates]:
        (out / date).mkdir(parents=True)
        write_recipe(make_recipe(root), out / date)
    return out


def shown(out: Path) -> list[str]:
    """Lines of the table."""
    console = Console(width=400)
    with console.capture() as captured:
        console.print(status_table(output_status(out, lambda *_: None)))
    return captured.get().splitlines()


def failed_with(error: str) -> str:
    return Failure(stage="train", error=error).model_dump_json()


def test_a_date_whose_events_are_gone_does_not_hide_the_others(tmp_path: Path) -> None:
    out = write_runs(tmp_path, 2)
    shutil.rmtree(tmp_path / "data" / "events" / f"dt={DAYS[0]}")

    lines = shown(out)

    (gone,) = [line for line in lines if DAYS[0] in line]
    assert f"--date {DAYS[0]}: the event log has no such day" in gone
    assert [line for line in lines if DAYS[1] in line and "train" in line]


@pytest.mark.parametrize("left", ["", '{"stage": "train"', "[]", '{"stage": "train"}'])
def test_a_failure_that_was_not_written_whole_is_shown_as_one(tmp_path: Path, left: str) -> None:
    out = write_runs(tmp_path, 1)
    failure = failure_file(out / DAYS[0] / "train")
    failure.write_text(left)

    (train,) = [line for line in shown(out) if "train" in line]
    assert "failed" in train
    assert f"{failure} cannot be read" in train


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no mapping"),
        ("name: 'small", "cannot be read"),
        ("name: small\n", "was cut off, or is of another version of Braid (data: required"),
        ("name: small\ninvented: 1\n", "was cut off, or is of another version"),
    ],
)
def test_a_recipe_that_is_damaged_is_said_to_be(tmp_path: Path, text: str, fault: str) -> None:
    out = write_runs(tmp_path, 2)
    (out / DAYS[0] / RECIPE_FILE).write_text(text)

    lines = shown(out)
    (damaged,) = [line for line in lines if DAYS[0] in line]
    assert fault in damaged
    assert "run the date again, which writes it anew" in damaged
    assert [line for line in lines if DAYS[1] in line and "train" in line]


def test_a_relative_data_root_is_looked_for_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_runs(tmp_path, 1)
    recipe = make_recipe(Path("data"))
    write_recipe(recipe, out / DAYS[0])
    monkeypatch.chdir(tmp_path)
    assert [line for line in shown(out) if "train" in line]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (line,) = [line for line in shown(out) if DAYS[0] in line]
    assert "data.root=data is relative to the directory that the run was started in" in line


def run_train(out: Path) -> None:
    """What a stage writes down when it begins."""
    note = this_process("train")
    running_file(out / DAYS[0] / "train").write_text(note.model_dump_json())


def test_a_stage_runs_as_long_as_its_process_holds_the_directory(tmp_path: Path) -> None:
    out = write_runs(tmp_path, 1)
    failure_file(out / DAYS[0] / "train").write_text(failed_with("of the time before"))
    run_train(out)
    assert "failed" in next(line for line in shown(out) if "train" in line), "it was killed"

    with exclusive(out, "braid run"):
        (train,) = [line for line in shown(out) if "train" in line]
        assert "running" in train
        assert "since 20" in train
        other = this_process("train").model_copy(update={"pid": 1})
        running_file(out / DAYS[0] / "train").write_text(other.model_dump_json())
        assert "failed" in next(line for line in shown(out) if "train" in line), "another one"


def test_who_holds_a_directory_is_known_while_it_does(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with exclusive(tmp_path, "braid run"):
        found = holder(tmp_path)
        assert found is not None
        assert found.command == "braid run"
    assert holder(tmp_path) is None

    assert holder(tmp_path / "nowhere") is None
    (tmp_path / OWNER).write_text(this_process("killed").model_dump_json())
    assert (tmp_path / LOCK).exists()
    assert holder(tmp_path) is None


def test_a_program_reads_the_state_of_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_runs(tmp_path, 2)
    (out / DAYS[1] / RECIPE_FILE).write_text("")
    run_train(out)

    with exclusive(out, "braid run --date D"):
        assert main(["status", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["production"], found["last_run"]) == (1, None, None)
    assert (found["held_by"]["command"], found["damaged"]) == ("braid run --date D", None)
    first, second = found["runs"]
    states = {stage["stage"]: stage["state"] for stage in first["stages"]}
    assert (states["ingest"], states["train"]) == ("missing", "running")
    assert (second["stages"], "holds no mapping" in second["problem"]) == ([], True)


def test_nothing_but_json_is_printed_where_files_are_read_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_runs(tmp_path, 1)

    assert main(["status", "--out", str(out), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []


def test_a_long_note_is_not_cut_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_runs(tmp_path, 1)
    note = "word " * 200 + "end"
    failure_file(out / DAYS[0] / "train").write_text(failed_with(note))

    assert main(["status", "--out", str(out)]) == 0
    assert note in capsys.readouterr().out

"""What a monitor reads of the last run, however it ended."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from deploy.app import main
from embedding.errors import UserError
from pipeline import last_run
from pipeline.artifacts import StageFacts
from pipeline.cluster import ENDED
from pipeline.command import Command
from pipeline.last_run import LAST_RUN, LastRun, Progress, read_last_run, recorded
from pipeline.lock import exclusive
from pipeline.output_name import claim
from pipeline.run import DayRun
from pipeline.stages import StageOutput, StageSpec
from tests.pipeline.small_log import DAYS, event, make_recipe, write_catalogue, write_day

ROOT = Path(__file__).parents[2]
AT_TRAIN = Progress("2024-01-01", "train")


def ended(out: Path, progress: Progress, error: BaseException | None = None) -> LastRun:
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, recorded(out, "braid run --date 2024-01-01") as recording:
        recording.progress = lambda: progress
        if error is not None:
            raise error
    written = read_last_run(out)
    assert written is not None
    return written


def test_a_run_is_ok_refused_failed_or_interrupted(tmp_path: Path) -> None:
    refused = Progress("2024-01-01", "publish", ("2024-01-01: auc is low",), ("look at this",))
    found = [
        ended(tmp_path, AT_TRAIN),
        ended(tmp_path, refused),
        ended(tmp_path, AT_TRAIN, RuntimeError("traceback\nthe cause")),
        ended(tmp_path, AT_TRAIN, UserError("mend this")),
        ended(tmp_path, AT_TRAIN, KeyboardInterrupt()),
        ended(tmp_path, AT_TRAIN, KeyboardInterrupt(ENDED)),
    ]

    assert [(run.outcome, run.code, run.stage, run.reason) for run in found] == [
        ("ok", 0, None, None),
        ("refused", 3, "gate", "2024-01-01: auc is low"),
        ("failed", 1, "train", "RuntimeError: the cause"),
        ("failed", 2, "train", "mend this"),
        ("interrupted", 130, "train", "ctrl-C"),
        ("interrupted", 130, "train", "ended by SIGTERM"),
    ]
    assert [run.warnings for run in found[:2]] == [(), ("look at this",)]
    assert {run.date for run in found} == {"2024-01-01"}
    assert all(run.started_at <= run.ended_at for run in found)


def test_a_disk_that_is_full_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(last_run, "write_durably", full)
    with pytest.raises(RuntimeError, match="cause"), recorded(tmp_path, "braid run"):
        raise RuntimeError("cause")
    assert "last_run.json could not be written" in caplog.text


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(2):
        write_day(root, day, [[event(day, 1, 60)]])
    recipe = tmp_path / "small.json.yaml"
    recipe.write_text(make_recipe(root).model_dump_json())
    return ["--recipe", str(recipe), "--out", str(tmp_path / "out")]


def test_a_run_that_fails_says_where(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def specs(run: DayRun, name: str) -> Any:
        def body(_: Path) -> StageOutput:
            if name == "join":
                raise UserError("mend the join")
            return StageOutput(1, 1, StageFacts())

        return [StageSpec(name, run.directory(name), {}, {}, body)]

    monkeypatch.setattr(DayRun, "specs", specs)
    assert main(["run", *words, "--date", DAYS[0]]) == 2

    found = read_last_run(tmp_path / "out")
    assert found is not None
    assert (found.command, found.date) == (f"braid run --date {DAYS[0]}", DAYS[0])
    assert (found.outcome, found.code, found.stage) == ("failed", 2, "join")
    assert found.reason == "mend the join"


def test_a_day_that_is_refused_before_its_stages_is_the_one_that_is_blamed(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "2030-01-01"
    assert main(["run", *words, "--date", missing]) == 2
    alone = read_last_run(tmp_path / "out")

    def run_day(command: Command, date: str) -> None:
        command._day(date).at = "publish"
        shutil.rmtree(tmp_path / "data" / "events" / f"dt={DAYS[1]}")

    write_day(tmp_path / "data", 2, [[event(2, 1, 60)]])
    monkeypatch.setattr(Command, "_run", run_day)
    assert main(["backfill", *words, "--from", DAYS[0], "--to", DAYS[1]]) == 2
    second = read_last_run(tmp_path / "out")

    for found, date in ((alone, missing), (second, DAYS[1])):
        assert found is not None
        assert (found.date, found.stage, found.code) == (date, None, 2)
        assert f"--date {date}: the event log has no such day" in str(found.reason)


@pytest.mark.parametrize("setting", ["gate.invented=1", "name=other"])
def test_a_command_that_could_not_begin_leaves_the_record_alone(
    tmp_path: Path, words: list[str], setting: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    claim(out, make_recipe(tmp_path / "data").name)
    assert main(["run", *words, "--date", DAYS[0], "--set", setting]) == 2
    assert not (out / LAST_RUN).exists()


def test_a_run_that_found_the_directory_in_use_leaves_the_record_alone(
    tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / "out"
    with exclusive(out, "braid backfill"):
        assert main(["run", *words, "--date", DAYS[0]]) == 2
    assert not (out / LAST_RUN).exists()


def test_a_stage_that_is_run_by_hand_is_no_run(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["stage", "invented", *words, "--date", DAYS[0]]) == 2
    assert not (tmp_path / "out" / LAST_RUN).exists()


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        (lambda run: run, ""),
        (lambda run: run.model_copy(update={"date": "2024-01-01"}), "ended"),
        (lambda run: run.model_copy(update={"outcome": "refused"}), "refused"),
    ],
)
def test_the_alarm_of_the_guide_goes_off_where_it_should(
    tmp_path: Path, change: Callable[[LastRun], LastRun], alarm: str
) -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "alarm.py").write_text(script)
    run = ended(tmp_path, Progress("2999-01-01", None))
    (tmp_path / LAST_RUN).write_text(change(run).model_dump_json())

    done = subprocess.run(
        [sys.executable, tmp_path / "alarm.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if alarm else 0)
    assert alarm in done.stderr
    assert bool(done.stderr) == bool(alarm)

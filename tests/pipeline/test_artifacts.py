import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout
from rich.console import Console

from embedding.errors import UserError
from pipeline import artifacts, lock
from pipeline.artifacts import (
    Manifest,
    StageFacts,
    config_hash,
    publish,
    read_manifest,
    writing,
)
from pipeline.console import Reporter
from pipeline.failures import user_error
from pipeline.lock import exclusive, holder
from pipeline.stages import StageOutput, StageSpec, execute, failure_file, failure_of, running_file
from pipeline.status import stage_state

MANIFEST = Manifest(stage="s", artifact_id="i", config_hash="c", facts=StageFacts())


class Counted(StageFacts):
    """Facts of a stage."""

    num_items: int
    days: tuple[str, ...]


def spec(directory: Path, body, config=None) -> StageSpec:
    return StageSpec("s", directory, config or {"a": 1}, {"input": "x"}, body)


def writes(text: str):
    def body(scratch: Path) -> StageOutput:
        (scratch / "file").write_text(text)
        return StageOutput(rows_in=2, rows_out=1, facts=Counted(num_items=3, days=("d",)))

    return body


def fails(scratch: Path) -> StageOutput:
    (scratch / "file").write_text("half")
    raise RuntimeError("broken")


def test_published_artifact_lists_the_checksum_of_every_file(tmp_path: Path) -> None:
    with writing(tmp_path / "a", "id") as scratch:
        (scratch / "file").write_bytes(b"abc")
        publish(scratch, tmp_path / "a", MANIFEST)

    manifest = read_manifest(tmp_path / "a")

    assert manifest is not None
    # SHA-256 test vector of "abc", FIPS 180-2 appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.checksums == {"file": expected}
    assert manifest.sizes == {"file": 3}


def test_failed_stage_leaves_nothing_visible_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        execute(spec(tmp_path / "a", fails), Reporter())

    assert [path.name for path in tmp_path.iterdir()] == [".a.failed.json"]
    assert "broken" in failure_file(tmp_path / "a").read_text()


def test_failed_rerun_keeps_the_old_artifact(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("old")), Reporter())

    with pytest.raises(RuntimeError):
        execute(spec(tmp_path / "a", fails, {"a": 2}), Reporter())

    assert (tmp_path / "a" / "file").read_text() == "old"


def test_current_artifact_is_not_written_again(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("first")), Reporter())

    record = execute(spec(tmp_path / "a", fails), Reporter())

    assert record.status == "current"


def test_changed_config_replaces_the_artifact(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("old")), Reporter())

    record = execute(spec(tmp_path / "a", writes("new"), {"a": 2}), Reporter())

    assert record.status == "ran"
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_resume_folder_outlives_a_crash_only_for_the_same_identity(tmp_path: Path) -> None:
    found: list[str] = []

    def fill_and_fail(identity: str) -> None:
        with writing(tmp_path / "a", identity) as scratch:
            found[:] = sorted(path.name for path in (scratch / "resume").iterdir())
            (scratch / "resume" / "step-1").write_text("x")
            raise RuntimeError

    def crash(identity: str) -> list[str]:
        with pytest.raises(RuntimeError):
            fill_and_fail(identity)
        return list(found)

    assert crash("one") == ["identity"]
    assert crash("one") == ["identity", "step-1"]
    assert crash("two") == ["identity"]
    assert (tmp_path / ".a.abandoned" / "resume" / "step-1").exists(), "set aside, not deleted"


class Killed(BaseException):
    """The process ends here: nothing that would run after a kill -9 may help."""


def kill_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """The `call`-th use of a function of `pipeline.artifacts` ends the process."""
    real, calls = getattr(artifacts, name), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args)

    monkeypatch.setattr(artifacts, name, counted)


def training(steps: list[str]) -> Callable[[Path], StageOutput]:
    """A body that keeps its work in `resume/` and notes whether it found it there."""

    def body(scratch: Path) -> StageOutput:
        done = scratch / "resume" / "result"
        steps.append("resumed" if done.exists() else "started")
        done.write_text("hours of work")
        (scratch / "model").write_text("weights")
        return StageOutput(1, 1, StageFacts())

    return body


def test_kill_while_publishing_keeps_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    with monkeypatch.context() as patch:
        kill_at(patch, "file_sha256", 1)
        with pytest.raises(Killed):
            execute(spec(tmp_path / "a", training(steps)), Reporter())

    execute(spec(tmp_path / "a", training(steps)), Reporter())

    assert steps == ["started", "resumed"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["manifest.json", "model"]


@pytest.mark.parametrize("rename", [1, 2])
def test_kill_between_the_renames_loses_no_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    execute(spec(tmp_path / "a", writes("old")), Reporter())
    real, calls = Path.rename, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == rename:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        patch.setattr(artifacts.shutil, "rmtree", lambda *_, **__: None)  # no clean-up after a kill
        with pytest.raises(Killed):
            execute(spec(tmp_path / "a", writes("new"), {"a": 2}), Reporter())

    record = execute(spec(tmp_path / "a", fails, {"a": 2}), Reporter())

    assert record.status == "current"
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_missing_file_makes_an_artifact_stale(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("first")), Reporter())
    (tmp_path / "a" / "file").unlink()

    assert execute(spec(tmp_path / "a", writes("again")), Reporter()).status == "ran"


def test_a_truncated_file_makes_an_artifact_stale(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("first")), Reporter())
    os.truncate(tmp_path / "a" / "file", 2)
    assert artifacts.damaged_files(tmp_path / "a", thorough=False) == ["file"]

    assert execute(spec(tmp_path / "a", writes("again")), Reporter()).status == "ran"


def test_everything_is_on_disk_before_the_manifest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else power that fails may leave a manifest beside empty files."""
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").readlink()
        synced.append(str(path.relative_to(tmp_path)))
        fsync(number)

    def note_rename(self: Path, target: Path) -> Path:
        synced.append(f"-> {target.name}")
        return rename(self, target)

    with writing(tmp_path / "a", "id") as scratch:
        (scratch / "folder").mkdir()
        (scratch / "folder" / "file").write_text("content")
        (scratch / "resume" / "checkpoint").write_text("nobody needs it any more")
        monkeypatch.setattr(os, "fsync", note)
        monkeypatch.setattr(Path, "rename", note_rename)
        publish(scratch, tmp_path / "a", MANIFEST)

    assert synced == [
        ".a.partial/folder",
        ".a.partial/folder/file",
        ".a.partial/manifest.json.partial",
        ".a.partial",
        "-> a",
        ".",
    ]


def test_facts_are_read_as_they_were_given(tmp_path: Path) -> None:
    ran = execute(spec(tmp_path / "a", writes("first")), Reporter()).manifest

    manifest = read_manifest(tmp_path / "a", Counted)

    assert manifest == ran
    assert manifest is not None
    assert manifest.facts == Counted(num_items=3, days=("d",))
    unread = read_manifest(tmp_path / "a")
    assert unread is not None
    assert unread.model_dump_json() == manifest.model_dump_json()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda facts: facts.pop("days"), "facts.days: Field required"),
        (lambda facts: facts.update(num_items="many"), "facts.num_items: Input should be"),
        (lambda facts: facts.update(num_users=1), "facts.num_users: Extra inputs"),
    ],
)
def test_facts_that_do_not_fit_say_what_where_and_what_to_do(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    execute(spec(tmp_path / "a", writes("first")), Reporter())
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest["facts"])
    path.write_text(json.dumps(manifest))

    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path / "a", Counted)

    said = str(caught.value)
    assert said.startswith(f"{path} is damaged or of another version of Braid ({fault}")
    assert said.endswith("restore it, or choose another output directory")
    assert read_manifest(tmp_path / "a") is not None, "who does not look into them goes on"


def test_warnings_of_a_stage_are_in_its_manifest(tmp_path: Path) -> None:
    def warns(scratch: Path) -> StageOutput:
        return StageOutput(1, 1, StageFacts(), warnings=("look at this",))

    execute(spec(tmp_path / "a", warns), Reporter())
    again = execute(spec(tmp_path / "a", fails), Reporter())

    assert (again.status, again.manifest.warnings) == ("current", ("look at this",))


def test_thorough_check_finds_a_changed_file(tmp_path: Path) -> None:
    execute(spec(tmp_path / "a", writes("first")), Reporter())
    (tmp_path / "a" / "file").write_text("sixth")

    assert artifacts.damaged_files(tmp_path / "a", thorough=False) == []
    assert artifacts.damaged_files(tmp_path / "a", thorough=True) == ["file"]


def test_work_goes_on_when_only_an_input_that_does_not_matter_changed(tmp_path: Path) -> None:
    steps: list[str] = []

    def interrupted(scratch: Path) -> StageOutput:
        training(steps)(scratch)
        raise RuntimeError

    def training_spec(body: Callable[[Path], StageOutput], plan: str) -> StageSpec:
        inputs, ignored = {"plan": plan, "data": "d"}, frozenset({"plan"})
        return StageSpec("s", tmp_path / "a", {}, inputs, body, resume_without=ignored)

    with pytest.raises(RuntimeError):
        execute(training_spec(interrupted, "two ranks"), Reporter())

    record = execute(training_spec(training(steps), "one rank"), Reporter())

    assert steps == ["started", "resumed"]
    assert record.manifest.inputs["plan"] == "one rank"


def test_failure_without_a_message_is_named_by_its_kind(tmp_path: Path) -> None:
    def stopped(_: Path) -> StageOutput:
        raise KeyboardInterrupt

    failing = spec(tmp_path / "a", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute(failing, Reporter())

    assert stage_state(failing) == ("failed", "KeyboardInterrupt")


class TrainingFailedError(Exception):
    """As Ray Train raises it: its own words first, workers' errors below and in an attribute."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"Training failed due to worker errors:\n[Rank 0]\n  Traceback\n{cause}\n")
        self.worker_failures = {0: cause}


@pytest.mark.parametrize(
    ("cause", "note"),
    [
        (UserError("the batch is too large;\nlower it"), "the batch is too large;\nlower it"),
        (RuntimeError("connection closed"), "connection closed"),
    ],
)
def test_the_note_of_a_failure_is_its_cause(tmp_path: Path, cause: Exception, note: str) -> None:
    def body(_: Path) -> StageOutput:
        raise TrainingFailedError(cause)

    failing = spec(tmp_path / "a", body)
    with pytest.raises(TrainingFailedError):
        execute(failing, Reporter())

    assert stage_state(failing) == ("failed", note)


def test_config_hash_ignores_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_directory_in_use_is_refused_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.lock import exclusive, holder\n"
        f"with exclusive(Path({str(tmp_path)!r}), 'braid run'):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"in use by `braid run` .pid {holder.pid}"),
            exclusive(tmp_path, "braid run"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with exclusive(tmp_path, "after a killed owner"):
        pass


def test_a_run_waits_for_another_command_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LOOK_TIMEOUT_S", 0.01)
    monkeypatch.setattr(lock, "POLL_INTERVAL_S", 0.01)
    said: list[str] = []
    with ExitStack() as other:
        other.enter_context(exclusive(tmp_path, "braid backfill"))

        def end_the_other(line: str) -> None:
            said.append(line)
            other.close()

        with exclusive(tmp_path, "braid run", wait_s=60, say=end_the_other):
            assert holder(tmp_path).command == "braid run"
            with (
                pytest.raises(UserError, match=r"in use by `braid run` .*still after 0.1 seconds"),
                exclusive(tmp_path, "braid run", wait_s=0.1),
            ):
                pass
    (line,) = said
    assert f"--out {tmp_path} is in use by `braid backfill` (pid {os.getpid()}" in line
    assert line.endswith("waiting for it, 60 seconds at most")


def test_only_the_directory_itself_is_blamed_on_the_directory(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="elsewhere"), exclusive(tmp_path, "braid run"):
        raise PermissionError("elsewhere")
    with pytest.raises(Timeout), exclusive(tmp_path, "braid run"):
        raise Timeout("another lock")
    assert not (tmp_path / ".owner.json").exists()

    class Unwritable(type(tmp_path)):  # type: ignore[misc] # root may write anywhere
        def mkdir(self, **_: object) -> None:
            raise PermissionError("read-only")

    with (
        pytest.raises(UserError, match="cannot be written: read-only"),
        exclusive(Unwritable(tmp_path), "braid run"),
    ):
        pass


def test_user_error_is_found_inside_ray_wrappers() -> None:
    class WorkerGroupError(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            self.worker_failures = failures

    class TaskError(UserError):
        cause = UserError("mend this")

    found = user_error(WorkerGroupError({1: TaskError("traceback ...")}))

    assert str(found) == "mend this"
    assert user_error(RuntimeError("ours")) is None


def test_full_disk_is_something_the_user_can_mend() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert "disk is full while writing runs/a" in str(user_error(full))

    quota = OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a")
    assert "disk quota is used up while writing runs/a" in str(user_error(quota))


def test_files_that_are_read_back_say_their_version(tmp_path: Path) -> None:
    def fails(scratch: Path) -> StageOutput:
        note = json.loads(running_file(tmp_path / "a").read_text())
        assert note["schema_version"] == 1
        raise UserError("no luck")

    with pytest.raises(UserError, match="no luck"):
        execute(StageSpec("a", tmp_path / "a", {}, {}, fails), Reporter(Console(quiet=True)))

    failed = failure_file(tmp_path / "a")
    assert json.loads(failed.read_text()) == {"schema_version": 1, "stage": "a", "error": "no luck"}
    failed.write_text('{"schema_version": 2, "stage": "a", "error": "later"}')
    assert str(failure_of(tmp_path / "a")).startswith(f"{failed} cannot be read")

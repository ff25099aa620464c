import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from embedding.errors import UserError
from pipeline.artifacts import Manifest, config_hash, publish, read_manifest, writing
from pipeline.console import Reporter
from pipeline.failures import user_error
from pipeline.lock import exclusive
from pipeline.stages import StageOutput, StageSpec, execute, failure_file

MANIFEST = Manifest(stage="s", artifact_id="i", config_hash="c")


def spec(directory: Path, body, config=None) -> StageSpec:
    return StageSpec("s", directory, config or {"a": 1}, {"input": "x"}, body)


def writes(text: str):
    def body(scratch: Path) -> StageOutput:
        (scratch / "file").write_text(text)
        return StageOutput(rows_in=2, rows_out=1)

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


def test_config_hash_ignores_the_order_of_keys() -> None:
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_directory_in_use_is_refused_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.lock import exclusive\n"
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
    error = OSError(28, "No space left on device", "runs/a")

    assert "disk is full while writing runs/a" in str(user_error(error))

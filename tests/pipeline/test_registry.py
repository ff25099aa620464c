import errno
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from deploy.app import main
from embedding.errors import UserError
from pipeline import lock
from pipeline.artifacts import Manifest, publish, writing
from pipeline.lock import exclusive
from pipeline.registry import production, production_before, promote, promotions, rollback
from tests.pipeline.stage_facts import published


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def publish_model(out: Path, date: str, artifact_id: str = "") -> None:
    directory, identity = out / date / "publish", artifact_id or date
    with writing(directory, identity) as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_text(identity)
        manifest = Manifest(
            stage="publish",
            artifact_id=identity,
            config_hash="",
            inputs={"train": f"train-{identity}"},
            facts=published(date),
        )
        publish(scratch, directory, manifest)


def test_last_promotion_is_in_production_and_rollback_returns_to_the_one_before(
    tmp_path: Path,
) -> None:
    for date in ("2024-01-01", "2024-01-02"):
        publish_model(tmp_path, date)
        promote(tmp_path, date)

    assert production(tmp_path).date == "2024-01-02"
    rollback(tmp_path)
    assert production(tmp_path).date == "2024-01-01"


def test_a_file_system_without_hard_links_keeps_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    publish_model(tmp_path, "2024-01-01")

    kept = promote(tmp_path, "2024-01-01")

    assert (kept.bundle / "weights").read_text() == "2024-01-01"


def test_promoting_twice_is_one_promotion(tmp_path: Path) -> None:
    publish_model(tmp_path, "2024-01-01")

    promote(tmp_path, "2024-01-01")
    promote(tmp_path, "2024-01-01")

    assert len(promotions(tmp_path).history) == 1


def test_unpublished_date_is_refused_with_the_published_ones(tmp_path: Path) -> None:
    publish_model(tmp_path, "2024-01-01")

    with pytest.raises(UserError, match="published are: 2024-01-01"):
        promote(tmp_path, "2024-01-02")
    assert production(tmp_path) is None


def test_rollback_without_an_earlier_model_is_refused(tmp_path: Path) -> None:
    publish_model(tmp_path, "2024-01-01")
    promote(tmp_path, "2024-01-01")

    with pytest.raises(UserError, match="nothing to roll back to"):
        rollback(tmp_path)
    assert production(tmp_path).date == "2024-01-01"


def test_rollback_returns_to_the_bundle_that_a_new_run_of_its_date_replaced(tmp_path: Path) -> None:
    for identity in ("first", "second"):
        publish_model(tmp_path, "2024-01-01", identity)
        promote(tmp_path, "2024-01-01")

    assert (production(tmp_path).bundle / "weights").read_text() == "second"
    rollback(tmp_path)

    assert (production(tmp_path).bundle / "weights").read_text() == "first"
    assert promotions(tmp_path).ever_promoted("second"), "a rollback is no reason to promote again"


def test_publishing_does_not_touch_production_before_it_is_promoted(tmp_path: Path) -> None:
    publish_model(tmp_path, "2024-01-01", "first")
    promote(tmp_path, "2024-01-01")
    publish_model(tmp_path, "2024-01-01", "second")

    assert (production(tmp_path).bundle / "weights").read_text() == "first"


def test_two_rollbacks_go_back_two_models_and_a_promotion_goes_on_from_there(
    tmp_path: Path,
) -> None:
    for day in (1, 2, 3):
        publish_model(tmp_path, f"2024-01-0{day}")
        promote(tmp_path, f"2024-01-0{day}")
    rollback(tmp_path)
    rollback(tmp_path)
    assert production(tmp_path).date == "2024-01-01"

    promote(tmp_path, "2024-01-03")
    assert production(tmp_path).date == "2024-01-03"
    rollback(tmp_path)
    assert production(tmp_path).date == "2024-01-01"


def test_model_of_a_date_is_compared_with_the_one_before_it(tmp_path: Path) -> None:
    for day in (1, 2):
        publish_model(tmp_path, f"2024-01-0{day}")
        promote(tmp_path, f"2024-01-0{day}")

    assert production_before(tmp_path, "2024-01-01") is None
    assert production_before(tmp_path, "2024-01-02").date == "2024-01-01"
    assert production_before(tmp_path, "2024-01-03").date == "2024-01-02"


def test_production_changes_while_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in (1, 2):
        publish_model(tmp_path, f"2024-01-0{day}")
        promote(tmp_path, f"2024-01-0{day}")

    with exclusive(tmp_path, "braid run"):
        assert main(["models", "rollback", "--out", str(tmp_path)]) == 0, capsys.readouterr()
        assert production(tmp_path).date == "2024-01-01"
        assert main(["models", "promote", "--out", str(tmp_path), "-d", "2024-01-02"]) == 0
    assert production(tmp_path).date == "2024-01-02"


def test_two_changes_of_production_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "CHANGE_TIMEOUT_S", 0.1)
    publish_model(tmp_path, "2024-01-01")

    with FileLock(tmp_path / ".production.json.lock"):
        for change in (lambda: promote(tmp_path, "2024-01-01"), lambda: rollback(tmp_path)):
            with pytest.raises(UserError, match="held by another process.*command again"):
                change()
    assert promotions(tmp_path).history == ()


def test_promoting_what_is_in_force_restores_its_kept_copy(tmp_path: Path) -> None:
    publish_model(tmp_path, "2024-01-01")
    promote(tmp_path, "2024-01-01")
    shutil.rmtree(tmp_path / "models" / "2024-01-01")

    assert (promote(tmp_path, "2024-01-01").bundle / "weights").read_text() == "2024-01-01"
    assert len(promotions(tmp_path).history) == 1


@pytest.mark.parametrize(
    "command", [["list"], ["current"], ["rollback"], ["promote", "-d", "2024-01-01"]]
)
def test_a_mistyped_directory_is_refused_and_not_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    out = tmp_path / "typo"

    assert main(["models", *command, "--out", str(out)]) == 2
    assert f"--out {out} is no directory" in capsys.readouterr().err
    assert not out.exists()

from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.artifacts import Manifest, publish, writing
from pipeline.registry import production, production_before, promote, promotions, rollback


def publish_model(out: Path, date: str, artifact_id: str = "") -> None:
    directory, identity = out / date / "publish", artifact_id or date
    with writing(directory, identity) as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_text(identity)
        publish(scratch, directory, Manifest(stage="publish", artifact_id=identity, config_hash=""))


def test_last_promotion_is_in_production_and_rollback_returns_to_the_one_before(
    tmp_path: Path,
) -> None:
    for date in ("2024-01-01", "2024-01-02"):
        publish_model(tmp_path, date)
        promote(tmp_path, date)

    assert production(tmp_path).date == "2024-01-02"
    rollback(tmp_path)
    assert production(tmp_path).date == "2024-01-01"


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

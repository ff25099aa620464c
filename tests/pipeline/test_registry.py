from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.artifacts import Manifest, publish, writing
from pipeline.registry import production, promote, promotions, rollback


def publish_model(out: Path, date: str) -> None:
    directory = out / date / "publish"
    with writing(directory, date) as scratch:
        (scratch / "bundle").mkdir()
        publish(scratch, directory, Manifest(stage="publish", artifact_id=date, config_hash=""))


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

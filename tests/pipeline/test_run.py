"""Which days a run trains on when it starts from an earlier one and holds days out."""

from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.artifacts import MANIFEST, Manifest
from pipeline.config import WindowConfig
from pipeline.console import Reporter
from pipeline.run import DayRun
from tests.pipeline.small_log import DAYS, make_recipe


def _run(tmp_path: Path, trained: list[str], window: WindowConfig) -> DayRun:
    """The run of the third day, after one of the second day that trained on `trained`."""
    for day in DAYS:
        (tmp_path / "data" / "events" / f"dt={day}").mkdir(parents=True)
    parent = tmp_path / "out" / DAYS[1] / "train"
    parent.mkdir(parents=True)
    manifest = Manifest(
        stage="train", artifact_id="i", config_hash="c", facts={"days": trained, "parent": None}
    )
    (parent / MANIFEST).write_text(manifest.model_dump_json())
    recipe = make_recipe(tmp_path / "data").model_copy(update={"window": window})
    return DayRun(
        recipe,
        tmp_path / "out",
        DAYS[2],
        session=None,
        reporter=Reporter(),
        publish=lambda *_: None,
    )


def test_a_day_held_out_yesterday_is_trained_today(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:1], WindowConfig(validation_days=1))

    assert run.training_days() == (DAYS[1],)
    assert run.split.validation == (DAYS[2],)


def test_without_held_out_days_only_the_new_one_is_trained(tmp_path: Path) -> None:
    assert _run(tmp_path, DAYS[:2], WindowConfig()).training_days() == (DAYS[2],)


def test_a_parent_that_trained_on_everything_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:2], WindowConfig(validation_days=1))

    with pytest.raises(UserError, match=rf"days up to {DAYS[1]}.*window.warm_start=false"):
        run.training_days()


def test_a_cold_start_trains_on_the_whole_window(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:2], WindowConfig(validation_days=1, warm_start=False))

    assert run.training_days() == tuple(DAYS[:2])

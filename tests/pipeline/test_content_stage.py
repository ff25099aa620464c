"""The content stage of a run: when it is current, and what makes it run again."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from embedding.errors import UserError
from multimodal.token_store import NO_ROW
from pipeline.consent import Consent
from pipeline.console import Reporter
from pipeline.content import reading, stage
from pipeline.run import DayRun
from pipeline.stages import execute, failure_of
from tests.multimodal.small_models import IMAGE_SIZE, save_image_model
from tests.one_process import encode_here
from tests.pipeline.small_log import DAYS, event, make_recipe, run_here, write_catalogue, write_day
from tests.pipeline.test_content import items, picture, small_content, write_items


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process."""
    for module in (reading, stage):
        monkeypatch.setattr(module, "stream_tasks", run_here)
    monkeypatch.setattr(stage, "encode_on_workers", encode_here)


def day_run(tmp_path: Path, *, refresh: bool = False, **changes: Any) -> DayRun:
    recipe = make_recipe(tmp_path / "data").model_copy(update={"content": small_content(**changes)})

    class NoSession:
        def wait_for(self, *_: Any) -> None:
            """Tasks run here."""

    return DayRun(
        recipe,
        tmp_path / "out",
        DAYS[1],
        session=NoSession(),
        reporter=Reporter(),
        publish=lambda *_: None,
        consent=Consent(refresh_catalogue=refresh),
    )


def test_the_stage_is_current_until_what_its_tokens_depend_on_changes(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    write_items(root, items(1, 4))
    (spec,) = day_run(tmp_path).specs("content")
    assert execute(spec, Reporter()).status == "ran"
    (again,) = day_run(tmp_path, dim=16, optimizer={"learning_rate": 0.1}).specs("content")
    assert again.is_current
    (other,) = day_run(tmp_path, text={"max_tokens": 5}).specs("content")
    assert not other.is_current
    write_items(root, items(1, 5))
    (kept,) = day_run(tmp_path).specs("content")
    assert kept.is_current
    (newer,) = day_run(tmp_path, refresh=True).specs("content")
    assert not newer.is_current


def test_files_that_changed_reach_a_finished_date_with_the_flag_alone(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    named = [row | {"image": f"{row['item_id']}.png"} for row in items(1, 4)]
    pq.write_table(pa.Table.from_pylist(named), root / "items.parquet")
    for item in (1, 2, 3):
        (root / f"{item}.png").write_bytes(picture(item))
    index = tmp_path / "out" / DAYS[1] / "content"

    def again(*, refresh: bool = False) -> tuple[str, int, str]:
        """What becomes of the stage, how many items have an image then, and the artifact."""
        (spec,) = day_run(tmp_path, refresh=refresh).specs("content")
        record = execute(spec, Reporter())
        rows = pq.read_table(index / "content.parquet")["image_row"].to_numpy()
        return record.status, int((rows != NO_ROW).sum()), record.manifest.artifact_id

    status, num_images, first = again()
    assert (status, num_images) == ("ran", 3)
    assert again(refresh=True) == ("current", 3, first)
    (root / "4.png").write_bytes(picture(4))
    assert again() == ("current", 3, first)
    status, num_images, repaired = again(refresh=True)
    assert (status, num_images) == ("ran", 4)
    assert repaired != first, "what was trained on the first one is stale"
    assert again() == again(refresh=True) == ("current", 4, repaired)


def test_a_hub_model_is_known_by_its_commit_without_a_download(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    write_items(root, items(1, 4))

    def identity(revision: str | None) -> str:
        model = {"model": "nobody/such-a-model", "revision": revision}
        (spec,) = day_run(tmp_path, text={**model, "max_tokens": 6}).specs("content")
        return spec.artifact_id

    assert identity("a" * 40) == identity("a" * 40) != identity("b" * 40)
    with pytest.raises(UserError, match="is a hub id, .* set `revision` beside `model`"):
        identity(None)
    with pytest.raises(ValidationError, match=r"text\.revision"):
        identity("main")


def test_a_model_is_known_by_its_bytes_not_by_when_it_was_copied(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    write_items(root, items(1, 4))
    image = {"model": save_image_model(tmp_path / "model"), "image_size": IMAGE_SIZE}
    (spec,) = day_run(tmp_path, image=image).specs("content")
    assert execute(spec, Reporter()).status == "ran"
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, (1e9, 1e9))
    (copied,) = day_run(tmp_path, image=image).specs("content")
    assert copied.is_current
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (other,) = day_run(tmp_path, image=image).specs("content")
    assert not other.is_current


def test_a_recipe_without_content_has_no_such_stage(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    run = day_run(tmp_path)
    run.recipe = make_recipe(root)
    assert not list(run.specs("content"))


def test_a_failure_before_the_stage_begins_is_its_failure_too(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, 60)]])
    pq.write_table(pa.table({"item_id": [1], "image": ["1.png"]}), root / "items.parquet")
    (spec,) = day_run(tmp_path).specs("content")
    with pytest.raises(UserError, match="has no column 'text'"):
        execute(spec, Reporter())
    assert "has no column 'text'" in str(failure_of(spec.directory))

"""The train stage around its workers, which a function stands in for."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.console import Reporter
from pipeline.train import CHECKPOINT, TrainInputs, TrainJob, train
from tests.pipeline.small_log import make_recipe
from tests.pipeline.stage_facts import RESULT


def finish(_: object, job: TrainJob, *__: object) -> None:
    """What the workers of a finished training leave."""
    for folder in (job.resume / "tensorboard", job.resume / "logs", job.checkpoints / "older"):
        folder.mkdir(parents=True)
    (job.checkpoints / RESULT.checkpoint).mkdir()
    (job.checkpoints / RESULT.checkpoint / "weights").write_text("w")
    (job.resume / "metrics.jsonl").write_text("")
    (job.resume / "result.json").write_text(RESULT.model_dump_json())


@pytest.mark.parametrize("has_links", [True, False])
def test_the_result_is_put_beside_what_a_restart_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    inputs = TrainInputs(samples=[], validation=[], plan=tmp_path, parent=None)

    result = train(make_recipe(tmp_path), inputs, tmp_path, Reporter(), run=finish)

    assert result == RESULT
    kept = tmp_path / CHECKPOINT / RESULT.checkpoint / "weights"
    written = tmp_path / "resume" / "checkpoints" / RESULT.checkpoint / "weights"
    assert kept.read_text() == written.read_text() == "w"
    assert [path.name for path in (tmp_path / CHECKPOINT).iterdir()] == [RESULT.checkpoint]
    assert kept.samefile(written) == has_links

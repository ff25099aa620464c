"""What a restarted worker group does with an error that only the user can mend."""

import errno
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from embedding.errors import CheckpointError, UserError
from pipeline import training_worker
from pipeline.codes import align_stage, align_worker
from pipeline.codes.align import AlignJob
from pipeline.evaluate import PREDICTIONS, EvaluateJob, _predict_worker
from pipeline.refusal import refusing_once
from pipeline.train import TrainedModel, TrainInputs, TrainJob, _train_worker
from tests.multimodal.small_models import tiny_config
from tests.pipeline.small_log import make_recipe


def train(folder: Path) -> None:
    inputs = TrainInputs(samples=[], validation=[], plan=folder, parent=None)
    job = TrainJob(recipe=make_recipe(folder), inputs=inputs, resume=folder)
    _train_worker({"job": job.model_dump_json()})


def predict(folder: Path) -> None:
    model = TrainedModel(recipe=make_recipe(folder), plan=folder, checkpoint=folder)
    job = EvaluateJob(model=model, samples=[], predictions=folder / PREDICTIONS)
    _predict_worker({"job": job.model_dump_json()})


def align(folder: Path) -> None:
    job = AlignJob(
        content=tiny_config(),
        training=None,
        num_steps=0,
        index=folder,
        stores=folder,
        pairs=None,
        state=None,
        standardised=False,
        rows=folder,
        output=folder,
    )
    align_stage._worker({"job": job.model_dump_json()})


@pytest.mark.parametrize(
    ("worker", "where", "work"),
    [
        (train, training_worker, "train_worker"),
        (predict, training_worker, "predict_worker"),
        (align, align_worker, "align_worker"),
    ],
)
@pytest.mark.parametrize("kind", [UserError, CheckpointError])
def test_what_the_user_must_change_is_tried_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: Callable[[Path], None],
    where: ModuleType,
    work: str,
    kind: type,
) -> None:
    calls = []

    def refuse(job: object) -> None:
        calls.append(job)
        raise kind("the checkpoint is damaged; restore it")

    monkeypatch.setattr(where, work, refuse)
    for _ in range(3):
        with pytest.raises(UserError, match=r"^the checkpoint is damaged; restore it$") as raised:
            worker(tmp_path)
        assert type(raised.value) is kind

    assert len(calls) == 1


def test_other_errors_and_no_error_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), refusing_once(tmp_path):
        raise RuntimeError("a rank has died")
    with refusing_once(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "fault"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")],
)
def test_a_full_disk_is_refused_once(tmp_path: Path, number: int, fault: str) -> None:
    calls = []

    def write() -> None:
        with refusing_once(tmp_path):
            calls.append(number)
            raise OSError(number, "no room", "file")

    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{fault} while writing file; free some space"):
            write()
    assert len(calls) == 1


def test_a_refusal_that_cannot_be_written_down_is_one_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mend this"), refusing_once(tmp_path / "nowhere"):
        raise UserError("mend this")

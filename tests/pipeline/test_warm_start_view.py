"""What is said about a warm start, also by a training that was restarted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from embedding.errors import CheckpointError
from embedding.warm_start_report import CarriedRows, WarmStartReport
from multimodal.cic import NO_ITEM, CicLoss
from multimodal.content_config import Cic
from pipeline import training_worker
from pipeline.reports.report import warm_start_section
from pipeline.reports.warm_start_view import redrawn_rows, warm_start_line
from pipeline.train import TrainInputs, TrainJob
from ranking.content import PENALTY, ContentPenalty
from ranking.progress import Progress
from tests.pipeline.small_log import make_recipe
from tests.pipeline.stage_facts import trained


def facts(**initialised: str) -> WarmStartReport:
    return WarmStartReport(
        carried=("tables/item", "dense/a", "dense/b"),
        initialised=initialised,
        ignored=(),
        dropped_ids={"user": 7, "item": 0},
    )


def test_line_counts_and_names_what_is_redrawn() -> None:
    report = facts(**{"tables/city": "not in the checkpoint", "dense/mlp.0": "shape changed"})

    assert warm_start_line(report, "2024-01-06") == (
        "warm start from 2024-01-06: carried 3, redrawn 2 (tables/city, dense/mlp.0)"
    )
    assert warm_start_line(facts(), "2024-01-06").endswith("carried 3, redrawn 0")


def test_line_counts_the_rows_of_code_tables() -> None:
    rows = {
        "sid_0": CarriedRows(carried=7, sourced=2, redrawn=0),
        "vq": CarriedRows(carried=40, sourced=5, redrawn=3),
    }
    line = warm_start_line(facts().model_copy(update={"rows": rows}), "d")
    assert line.endswith(
        "redrawn 0; rows of 2 code tables: 47 go on, 7 start from the most similar row, 3 anew"
    )


def test_line_counts_tables_whose_optimizer_is_another() -> None:
    report = facts().model_copy(update={"weights_only": ("tables/item",)})
    assert warm_start_line(report, "d") == (
        "warm start from d: carried 3, of 1 tables weights only, for the optimizer is another one, "
        "redrawn 0"
    )
    assert redrawn_rows(report)[0]["name"] == "tables/item"


def test_line_stays_short_and_the_rows_have_everything() -> None:
    report = facts(**{f"dense/{i}": f"shape changed from {i}" for i in range(9)})

    assert warm_start_line(report, "d").endswith("dense/4, dense/5 and 3 more)")
    rows = redrawn_rows(report)
    assert [row["why"] for row in rows[:9]] == [f"shape changed from {i}" for i in range(9)]
    assert rows[9:] == [{"name": "tables/user", "why": "7 ids of the earlier run found no room"}]


def test_the_line_says_that_dense_weights_start_from_the_average() -> None:
    line = warm_start_line(facts().model_copy(update={"from_average": ("a", "b")}), "2024-01-06")
    assert line == (
        "warm start from 2024-01-06: carried 3, of 2 dense ones the published average, for none is "
        "kept now, redrawn 0"
    )


class Checkpoints:
    """Those of a training that has saved `step`; of a new one for None."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def load_latest(self, _: Any) -> tuple[int, dict[str, Any]] | None:
        return None if self.step is None else (self.step, Progress(step=self.step).state_dict())


def job(folder: Path) -> TrainJob:
    return TrainJob(
        recipe=make_recipe(folder),
        inputs=TrainInputs(samples=[], validation=[], plan=folder, parent=folder),
        resume=folder,
    )


def test_a_restarted_training_still_says_what_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = WarmStartReport(carried=("tables/item",), initialised={}, ignored=(), dropped_ids={})
    monkeypatch.setattr(training_worker, "load_into", lambda *_: made)
    monkeypatch.setattr(training_worker.dist, "get_rank", lambda: 0)

    def restore(step: int | None) -> tuple[Progress, WarmStartReport | None]:
        checkpoints: Any = Checkpoints(step)
        return training_worker._restore(job(tmp_path), None, checkpoints)  # type: ignore[arg-type]

    _, at_start = restore(None)
    progress, after_restart = restore(20)

    assert progress.step == 20
    assert at_start == after_restart == made


def test_a_damaged_parent_is_said_to_be_replaceable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise CheckpointError("it is damaged; make it again")

    monkeypatch.setattr(training_worker, "load_into", load)
    train = tmp_path / "2024-01-01" / "train"
    checkpoints: Any = Checkpoints(None)
    sharded: Any = None
    with pytest.raises(CheckpointError) as raised:
        training_worker._restore(job(train), sharded, checkpoints)
    assert str(raised.value) == (
        f"it is damaged; make it again: once {train} is deleted, `braid run --date 2024-01-01 "
        f"--out {tmp_path}` with this recipe makes it again, and until then later days start from "
        "the model before it"
    )


@pytest.mark.parametrize("step", [None, 20])
def test_a_queue_of_negatives_is_the_runs_own(
    step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = CicLoss(Cic(negatives="queue", queue_size=4), content_dim=2, id_dim=2)
    queued(torch.randn(2, 2), torch.randn(2, 2), torch.tensor([5, 6]))
    model = nn.Module()
    model.add_module(PENALTY, ContentPenalty(queued, "item_id"))
    queue = tuple(f"buffers/{name}" for name, _ in model.named_buffers())
    made = WarmStartReport(
        carried=("tables/item", *queue), initialised={}, ignored=(), dropped_ids={}
    )
    monkeypatch.setattr(training_worker, "load_into", lambda *_: made)
    monkeypatch.setattr(training_worker.dist, "get_rank", lambda: 0)
    sharded: Any = SimpleNamespace(model=SimpleNamespace(module=model))
    checkpoints: Any = Checkpoints(step)

    _, report = training_worker._restore(job(tmp_path), sharded, checkpoints)

    if step is None:
        assert report is not None
        assert queued.queue_rows_M.eq(NO_ITEM).all()
        assert report.carried == ("tables/item",)
        assert report.initialised == dict.fromkeys(queue, "of the earlier run's steps")
    else:
        assert sorted(queued.queue_rows_M.tolist()) == [NO_ITEM, NO_ITEM, 5, 6]


def test_a_training_without_a_parent_started_from_drawn_values() -> None:
    section = warm_start_section(trained(["2024-01-06"]))
    assert section["warm_start"].startswith("cold start")

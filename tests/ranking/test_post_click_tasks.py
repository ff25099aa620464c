"""Post-click tasks: probabilities, gradients at the extremes, labels, and refused graphs."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from embedding.loader import SampleFiles, SampleLoader
from ranking.config import RankingConfig, TaskConfig
from ranking.losses import TaskLoss
from ranking.tasks import EntireSpaceLabels, TaskChain, probabilities
from tests.ranking.small_run import NUM_ROWS, SCHEMA, write_samples

# A buy follows a cart, which follows a click; a like stands alone. Children come first here.
TASKS = (
    TaskConfig(name="buy", after="cart"),
    TaskConfig(name="like"),
    TaskConfig(name="click"),
    TaskConfig(name="cart", after="click"),
)


def test_probabilities_are_products_along_the_chain() -> None:
    logits_BT = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3
    buy, like, click, cart = torch.sigmoid(logits_BT.double()).unbind(1)
    expected = torch.stack([click * cart * buy, like, click, click * cart], dim=1)
    found = probabilities(TaskChain(TASKS)(logits_BT))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_independent_tasks_are_left_alone() -> None:
    logits_BT = torch.randn(5, 2)
    assert TaskChain((TaskConfig(name="a"), TaskConfig(name="b")))(logits_BT) is logits_BT


@pytest.mark.parametrize("scale", [1.0, 30.0, 80.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_loss_and_gradient_hold_where_probabilities_round(scale: float, label: float) -> None:
    """Against -log p and -log(1 - p) of the product, written out in exact terms.

    log(1 - ab) = log((1 - a) + a (1 - b)), a sum of two products that do not round to 0.
    """
    tasks = (TaskConfig(name="click"), TaskConfig(name="buy", after="click"))
    generator = torch.Generator().manual_seed(0)
    logits_BT = scale * torch.randn(64, 2, generator=generator)
    weights_BT = torch.tensor([0.0, 1.0]).expand(64, 2)

    ours = logits_BT.clone().requires_grad_()
    TaskLoss([1.0, 1.0])(TaskChain(tasks)(ours), torch.full((64, 2), label), weights_BT).backward()

    theirs = logits_BT.double().requires_grad_()
    click, buy = theirs.unbind(1)
    log = torch.nn.functional.logsigmoid
    log_p = log(click) + log(buy)
    log_not_p = torch.logaddexp(log(-click), log(click) + log(-buy))
    (-(log_p if label else log_not_p).sum() / 64).backward()

    assert ours.grad.isfinite().all()
    # The loss is float32: where it is certain, 1e-7 of its gradient's scale is lost.
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_missing_label_counts_as_0_where_the_parent_is_0() -> None:
    labels = {  # buy, like, click, cart; None: not observed
        (None, None, 0, None): (0, None, 0, 0),  # nothing follows a click that was not
        (None, None, 1, None): (None, None, 1, None),  # not known yet
        (None, 1, 1, 0): (0, 1, 1, 0),
        (1, 0, 1, 1): (1, 0, 1, 1),
        (None, None, None, None): (None, None, None, None),
        (1, None, 0, None): (1, None, 0, 0),  # observed labels are used as they are
    }
    given = torch.tensor([[math.nan if x is None else x for x in row] for row in labels])
    expected = torch.tensor(
        [[math.nan if x is None else x for x in row] for row in labels.values()]
    )
    found, weights = EntireSpaceLabels(TASKS)(given, torch.ones_like(given))
    assert weights.equal((~expected.isnan()).float())
    assert found.equal(expected.nan_to_num(0.0))


def test_null_and_0_are_the_same_without_a_click_whatever_the_rows_weigh() -> None:
    tasks = (TaskConfig(name="click"), TaskConfig(name="buy", after="click", sample_weight="w"))
    weights_BT = torch.tensor([[1.0, 10.0], [0.5, 0.0], [0.0, 2.0], [1.0, 10.0], [0.0, 0.0]])
    click_B = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])  # the last row fills up a batch
    for spelling in (math.nan, 0.0):
        buy_B = torch.where(click_B == 0, spelling, 1.0)
        labels, weights = EntireSpaceLabels(tasks)(torch.stack([click_B, buy_B], 1), weights_BT)
        assert labels.tolist() == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
        assert weights.equal(weights_BT)


def test_both_spellings_are_the_same_from_the_files_on(tmp_path: Path) -> None:
    tasks = (TaskConfig(name="click"), TaskConfig(name="like", after="click", sample_weight="w"))
    path, found = tmp_path / "part.parquet", []
    for spelling in (None, 0.0):
        write_samples(path)
        table = pq.read_table(path).drop_columns("label:like")
        like = [1.0 if clicked else spelling for clicked in table["label:click"].to_pylist()]
        table = table.append_column("label:like", pa.array(like, pa.float32()))
        weights = pa.array([row % 7 for row in range(len(table))], pa.float32())
        pq.write_table(table.append_column("weight:like", weights), path, row_group_size=50)
        files = SampleFiles([path], SCHEMA, [task.name for task in tasks])
        of_ranks = []
        for rank in range(2):
            loader = SampleLoader(files, batch_size_per_rank=16, rank=rank, world_size=2)
            with loader.sequential() as stream:
                for batch in stream:
                    both = EntireSpaceLabels(tasks)(batch.labels_BT, batch.weights_BT)
                    of_ranks.append(torch.cat([part[: batch.num_rows] for part in both], dim=1))
        found.append(torch.cat(of_ranks))

    assert found[0].equal(found[1])
    assert found[0][:, 3].equal(torch.arange(NUM_ROWS) % 7.0)
    assert found[0][:, 1].equal(found[0][:, 0])  # everybody who clicked likes


def test_an_outcome_that_is_not_known_yet_weighs_nothing() -> None:
    tasks = (TaskConfig(name="click"), TaskConfig(name="buy", after="click", sample_weight="w"))
    labels_BT = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
    labels, weights = EntireSpaceLabels(tasks)(labels_BT, torch.full((2, 2), 3.0))
    assert labels.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert weights.tolist() == [[3.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"name": "buy", "after": "clik"}], "after='clik' is not among the tasks.*add it"),
        ([{"name": "buy", "after": "buy"}], r"circle \(buy after buy\).*leave `after` out"),
        (
            [
                {"name": "a", "after": "b"},
                {"name": "b", "after": "c"},
                {"name": "c", "after": "b"},
            ],
            r"circle \(a after b after c after b\)",
        ),
    ],
)
def test_task_graphs_that_are_none_are_refused(tasks: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RankingConfig.model_validate({"tasks": tasks})


def test_conversions_are_learnt_over_all_rows() -> None:
    """p(buy) is calibrated on all impressions although buys are observed after clicks only."""
    generator = torch.Generator().manual_seed(0)
    tasks = (TaskConfig(name="click"), TaskConfig(name="buy", after="click"))
    click_B = (torch.rand(4000, generator=generator) < 0.2).float()
    buy_B = (torch.rand(4000, generator=generator) < 0.5).float()
    given_BT = torch.stack([click_B, torch.where(click_B == 1, buy_B, math.nan)], dim=1)
    labels_BT, weights_BT = EntireSpaceLabels(tasks)(given_BT, torch.ones(4000, 2))
    bias_T = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias_T], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits_BT = TaskChain(tasks)(bias_T.expand(4000, 2))
        loss = TaskLoss([1.0, 1.0])(logits_BT, labels_BT, weights_BT)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = probabilities(TaskChain(tasks)(bias_T.detach().unsqueeze(0)))[0]
    torch.testing.assert_close(found, labels_BT.mean(dim=0), rtol=1e-3, atol=1e-4)
    given_click = torch.sigmoid(bias_T.detach()[1])
    torch.testing.assert_close(given_click, labels_BT[click_B == 1, 1].mean(), rtol=1e-3, atol=1e-4)

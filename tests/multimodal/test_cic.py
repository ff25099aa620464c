"""The content-ID-contrastive loss against its formula, term by term."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from multimodal.cic import NO_ITEM, CicLoss
from multimodal.content_config import Cic

DIM, ID_DIM = 4, 3


def cic_loss(**settings: Any) -> CicLoss:
    torch.manual_seed(0)
    return CicLoss(Cic.model_validate({"weight": 1.0, "temperature": 0.5, **settings}), DIM, ID_DIM)


def candidates(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Content and ID embeddings of samples; equal items have equal ones."""
    random = torch.Generator().manual_seed(1)
    content_RD = torch.randn(10, DIM, generator=random)
    ids_RX = torch.randn(10, ID_DIM, generator=random)
    rows_B = torch.tensor(rows, dtype=torch.int64)
    return (
        content_RD[rows_B].requires_grad_(),
        ids_RX[rows_B].requires_grad_(),
        rows_B,
    )


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


def by_formula(
    loss: CicLoss, pairs: list[tuple[Tensor, Tensor]], negatives: list[list[tuple[Tensor, Tensor]]]
) -> float:
    """Mean over items of both directions; `negatives` of each item as (content, id)."""
    total = 0.0
    t = loss.config.temperature
    for (content, ids), others in zip(pairs, negatives, strict=True):
        own = math.exp(float(content @ ids) / t)
        to_ids = sum(math.exp(float(content @ other) / t) for _, other in others)
        to_content = sum(math.exp(float(ids @ other) / t) for other, _ in others)
        total -= math.log(own / (own + to_ids)) + math.log(own / (own + to_content))
    return total / 2 / len(pairs)


def heads(loss: CicLoss, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(z_c, z_d) of items."""
    content_BD, ids_BX, _ = candidates(rows)
    return [
        (unit(loss.content_head.weight @ c), unit(loss.id_head.weight @ d))
        for c, d in zip(content_BD.detach(), ids_BX.detach(), strict=True)
    ]


def test_in_batch_negatives_are_the_other_distinct_items() -> None:
    loss = cic_loss(negatives="in_batch")
    pairs = heads(loss, [2, 5, 7])
    others = [[pair for j, pair in enumerate(pairs) if j != i] for i in range(3)]
    expected = by_formula(loss, pairs, others)
    for rows in ([2, 5, 7], [5, 2, 2, 7, 5], [7, NO_ITEM, 5, 2, NO_ITEM]):
        assert float(loss(*candidates(rows))) == pytest.approx(expected, abs=1e-5)


def test_one_negative_of_two_items_is_the_other_one() -> None:
    loss = cic_loss(negatives="uniform", num_negatives=1)
    pairs = heads(loss, [4, 6])
    expected = by_formula(loss, pairs, [[pairs[1]], [pairs[0]]])
    assert float(loss(*candidates([4, 6, 4]))) == pytest.approx(expected, abs=1e-5)


def test_uniform_negatives_never_hold_the_item_and_reach_all_others() -> None:
    loss = cic_loss(negatives="uniform", num_negatives=3)
    pairs = heads(loss, [1, 2, 3])
    others = [[pair for j, pair in enumerate(pairs) if j != i] for i in range(3)]
    possible = set()
    for counts in range(4):  # so many of three draws are the first of the other two
        drawn = [[other[0]] * counts + [other[1]] * (3 - counts) for other in others]
        possible.add(tuple(by_formula(loss, pairs[i : i + 1], drawn[i : i + 1]) for i in range(3)))
    sums = {
        a + b + c
        for a in _column(possible, 0)
        for b in _column(possible, 1)
        for c in _column(possible, 2)
    }
    seen = {min(sums, key=lambda s: abs(s - 3 * value)) for value in _values(loss)}
    for value in _values(loss):
        assert min(abs(s - 3 * value) for s in sums) < 1e-4
    assert len(seen) > 10


def _column(rows: set[tuple[float, ...]], at: int) -> list[float]:
    return [row[at] for row in rows]


def _values(loss: CicLoss) -> list[float]:
    torch.manual_seed(2)
    return [float(loss(*candidates([1, 2, 3]))) for _ in range(50)]


def test_the_queue_holds_earlier_items_without_gradient() -> None:
    loss = cic_loss(negatives="queue", queue_size=2, num_negatives=40)
    first = candidates([1, 2])
    assert float(loss(*first)) == pytest.approx(0.0, abs=1e-6)  # nothing to compare with yet
    pairs = heads(loss, [3, 1])
    queued = heads(loss, [1, 2])
    torch.manual_seed(3)
    drawn = (torch.rand(2, 40) * 2).long().tolist()
    # Items are in the order of their rows: 1, whose own entry does not count, then 3.
    negatives = [[queued[i] for i in drawn[1]], [queued[1] for i in drawn[0] if i == 1]]
    torch.manual_seed(3)
    second = candidates([3, 1])
    value = loss(*second)
    assert float(value) == pytest.approx(by_formula(loss, pairs, negatives), abs=1e-5)
    value.backward()
    assert second[0].grad.abs().sum(dim=1).gt(0).all()
    assert first[0].grad is None
    assert sorted(loss.queue_rows_M.tolist()) == [1, 3]
    loss.eval()
    loss(*candidates([5]))
    assert sorted(loss.queue_rows_M.tolist()) == [1, 3]


def test_more_items_than_the_queue_holds_leave_its_newest() -> None:
    loss = cic_loss(negatives="queue", queue_size=3)
    loss(*candidates([1, 2, 3, 4, 5]))
    assert sorted(loss.queue_rows_M.tolist()) == [3, 4, 5]


def test_a_queue_that_was_forgotten_is_as_a_new_one() -> None:
    loss, new = (cic_loss(negatives="queue", queue_size=3) for _ in range(2))
    loss(*candidates([1, 2, 3, 4]))
    loss.forget()
    for rows in ([7, 8], [9, 5]):
        values = []
        for each in (loss, new):
            torch.manual_seed(1)
            values.append(each(*candidates(rows)).detach())
        assert values[0].equal(values[1])
    assert loss.queue_rows_M.equal(new.queue_rows_M)


@pytest.mark.parametrize("negatives", ["in_batch", "uniform", "queue"])
def test_gradient_reaches_both_sides_and_both_heads(negatives: str) -> None:
    loss = cic_loss(negatives=negatives)
    loss(*candidates([8, 9, 7]))
    content_BD, ids_BX, rows_B = candidates([1, 2, 2, 3])
    loss(content_BD, ids_BX, rows_B).backward()
    for gradient in (content_BD.grad, ids_BX.grad):
        assert gradient.abs().sum(dim=1).gt(0).tolist() == [True, True, False, True]
    assert loss.content_head.weight.grad.any()
    assert loss.id_head.weight.grad.any()


@pytest.mark.parametrize("negatives", ["in_batch", "uniform", "queue"])
def test_training_on_it_brings_both_sides_of_an_item_together(negatives: str) -> None:
    loss = cic_loss(negatives=negatives)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    batch = [part.detach() for part in candidates([0, 1, 2, 3])]
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(*batch)
        value.backward()
        optimizer.step()
        values.append(float(value))
    assert values[-1] < 0.6 * max(values)


@pytest.mark.parametrize("rows", [[], [NO_ITEM, NO_ITEM], [4]])
@pytest.mark.parametrize("negatives", ["in_batch", "uniform", "queue"])
def test_a_batch_without_two_items_costs_nothing(negatives: str, rows: list[int]) -> None:
    loss = cic_loss(negatives=negatives)
    value = loss(*candidates(rows))
    value.backward()
    assert float(value) == pytest.approx(0.0, abs=1e-6)


def test_the_weight_scales_the_loss() -> None:
    batch = candidates([1, 2, 3])
    plain, light = cic_loss(negatives="in_batch"), cic_loss(negatives="in_batch", weight=0.25)
    assert float(light(*batch)) == pytest.approx(0.25 * float(plain(*batch)))

"""Optimizer of data-parallel tables against torch.optim and plain formulas."""

import pytest
import torch
from torch import nn

from embedding.config import Adagrad, Adam, RowWiseAdagrad, Sgd
from embedding.row_optimizer import RowOptimizer

TOLERANCE = 1e-6  # float32, a few operations in another order


def run(optimizer, reference=None, steps: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    start = torch.randn(6, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    row_optimizer = RowOptimizer([(ours, 0.1)], optimizer)
    torch_optimizer = reference([theirs])
    for _ in range(steps):
        grad = torch.randn(6, 4)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        row_optimizer.step()
        torch_optimizer.step()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (Sgd(), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Adagrad(eps=1e-8), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
        (Adam(eps=1e-8), lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-8)),
    ],
)
def test_equals_torch_when_every_row_is_touched(optimizer, reference) -> None:
    ours, theirs = run(optimizer, reference)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_row_wise_adagrad_accumulates_the_mean_square_of_a_row() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = RowOptimizer([(weight, 0.5)], RowWiseAdagrad(eps=1e-8))
    accumulator, expected = torch.zeros(3), torch.ones(3, 4)
    for seed in range(3):
        grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        weight.grad = grad.clone()
        optimizer.step()
        accumulator += (grad**2).mean(1)
        expected -= 0.5 * grad / (accumulator.sqrt() + 1e-8)[:, None]
    torch.testing.assert_close(weight.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("optimizer", [Sgd(), Adagrad(), Adam(weight_decay=0.1), RowWiseAdagrad()])
def test_rows_without_gradient_do_not_move(optimizer) -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    row_optimizer = RowOptimizer([(weight, 0.5)], optimizer)
    for touched in (0, 1):
        weight.grad = torch.zeros(3, 4)
        weight.grad[touched] = 1.0
        before = weight.detach().clone()
        row_optimizer.step()
        moved = (weight.detach() != before).any(dim=1)
        assert moved.tolist() == [row == touched for row in range(3)]


@pytest.mark.parametrize(
    "optimizer", [Sgd(), Adagrad(), Adam(weight_decay=0.1), RowWiseAdagrad(weight_decay=0.1)]
)
def test_all_rows_at_once_as_on_gpus_change_what_the_touched_rows_alone_do(optimizer) -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 4)
    some, whole = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    by_rows = RowOptimizer([(some, 0.1)], optimizer)
    at_once = RowOptimizer([(whole, 0.1)], optimizer)
    at_once._update_some = at_once._update_all
    for _ in range(3):
        grad = torch.randn(6, 4) * (torch.rand(6, 1) < 0.5)
        some.grad, whole.grad = grad.clone(), grad.clone()
        by_rows.step()
        at_once.step()
        assert whole.equal(some)
        for name, state in by_rows.state[some].items():
            assert at_once.state[whole][name].equal(state)
    assert not whole.equal(start)

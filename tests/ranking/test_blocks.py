"""Every block of the ranker against a loop that follows its formula."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from embedding.config import TableConfig
from embedding.errors import UserError
from embedding.feature_schema import (
    DenseFeature,
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from ranking.config import ModelConfig
from ranking.interactions import CrossNetwork, fm_second_order
from ranking.interest import TargetAttention
from ranking.interest_config import Din
from ranking.losses import TaskLoss
from ranking.model import Ranker

# float32 sums of up to some hundred terms of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rank", [None, 3])
def test_cross_network_follows_its_formula(rank: int | None) -> None:
    network = CrossNetwork(dim=7, num_layers=3, rank=rank)
    x0_B7 = torch.randn(5, 7, requires_grad=True)
    expected = []
    for x0 in x0_B7:
        x = x0
        for layer in network.layers:
            if rank is None:
                mapped = layer.weight @ x + layer.bias
            else:
                mapped = layer[1].weight @ (layer[0].weight @ x) + layer[1].bias
            x = x0 * mapped + x
        expected.append(x)
    crossed_B7 = network(x0_B7)
    torch.testing.assert_close(crossed_B7, torch.stack(expected), **CLOSE)

    weight_B7 = torch.randn(5, 7)
    reads = [x0_B7, *network.parameters()]
    grads = torch.autograd.grad((crossed_B7 * weight_B7).sum(), reads)
    for grad, of_loop in zip(
        grads, torch.autograd.grad((torch.stack(expected) * weight_B7).sum(), reads), strict=True
    ):
        torch.testing.assert_close(grad, of_loop, **CLOSE)


def test_fm_is_the_sum_over_all_pairs() -> None:
    fields_BFD = torch.randn(4, 6, 8)
    expected = [
        sum(float(sample[a] @ sample[b]) for a in range(6) for b in range(a + 1, 6))
        for sample in fields_BFD
    ]
    torch.testing.assert_close(fm_second_order(fields_BFD)[:, 0], torch.tensor(expected), **CLOSE)


def _attend_by_loop(
    block: TargetAttention, query_BD: Tensor, keys_ND: Tensor, side_NS: Tensor, lengths: list[int]
) -> Tensor:
    """One sample and one event at a time, first layer on the concatenation itself."""
    rows, start = [], 0
    for query, length in zip(query_BD, lengths, strict=True):
        scores, events = [], []
        for n in range(start, start + length):
            key, side = keys_ND[n], side_NS[n]
            features = torch.cat([query, key, query - key, query * key, side])
            scores.append(block.output(block.hidden(block.input(features).relu()))[0])
            events.append(torch.cat([key, side]))
        start += length
        if not events:
            rows.append(torch.zeros(block.output_dim))
            continue
        weights = torch.stack(scores)
        if block.softmax:
            weights = weights.softmax(dim=0)
        rows.append((weights[:, None] * torch.stack(events)).sum(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("side_dim", [0, 3])
@pytest.mark.parametrize("hidden", [(16,), (16, 8)])
def test_target_attention_equals_a_loop_with_gradients(
    softmax: bool, side_dim: int, hidden: tuple[int, ...]
) -> None:
    lengths = [2, 0, 5, 1, 0]
    block = TargetAttention(4, side_dim, hidden, softmax=softmax)
    inputs = [torch.randn(5, 4), torch.randn(8, 4), torch.randn(8, side_dim)]
    inputs = [x.requires_grad_() for x in inputs]
    weights_BX = torch.randn(5, 4 + side_dim)
    outputs, gradients = [], []
    for attend in (
        lambda: block(*inputs, torch.tensor(lengths)),
        lambda: _attend_by_loop(block, *inputs, lengths),
    ):
        out_BX = attend()
        parameters = [x for x in inputs if x.numel()] + list(block.parameters())
        # Under softmax the last bias shifts all scores alike: its gradient is 0, or None in a loop.
        grads = torch.autograd.grad((out_BX * weights_BX).sum(), parameters, allow_unused=True)
        outputs.append(out_BX)
        gradients.append(grads)
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, **CLOSE)


def test_target_attention_of_empty_histories_is_zero() -> None:
    block = TargetAttention(4, 2, (8,), softmax=True)
    out = block(torch.randn(3, 4), torch.empty(0, 4), torch.empty(0, 2), torch.zeros(3).long())
    assert out.equal(torch.zeros(3, 6))


def test_loss_is_the_weighted_sum_over_rows_divided_by_the_batch_size() -> None:
    loss = TaskLoss([1.0, 3.0])
    logits_BT, labels_BT = torch.randn(5, 2), torch.randint(0, 2, (5, 2)).float()
    weights_BT = torch.tensor([[1.0, 0], [1, 1], [0, 1], [2, 1], [0, 0]])
    expected = 0.0
    for b in range(5):
        for t, task_weight in enumerate((1.0, 3.0)):
            p = 1 / (1 + math.exp(-logits_BT[b, t]))
            log_likelihood = math.log(p if labels_BT[b, t] else 1 - p)
            expected -= task_weight * float(weights_BT[b, t]) * log_likelihood / 5
    assert loss(logits_BT, labels_BT, weights_BT).item() == pytest.approx(expected, rel=1e-5)


def test_mean_loss_of_two_ranks_is_the_loss_of_one() -> None:
    loss = TaskLoss([1.0, 2.0])
    logits_BT, labels_BT = torch.randn(8, 2), torch.randint(0, 2, (8, 2)).float()
    weights_BT = torch.randint(0, 2, (8, 2)).float()
    parts = (loss(logits_BT[h], labels_BT[h], weights_BT[h]) for h in (slice(4), slice(4, 8)))
    torch.testing.assert_close(sum(parts) / 2, loss(logits_BT, labels_BT, weights_BT))


def test_a_missing_label_gives_no_gradient() -> None:
    logits_BT = torch.randn(3, 2, requires_grad=True)
    weights_BT = torch.tensor([[1.0, 0], [1, 1], [0, 0]])
    TaskLoss([1.0, 1.0])(logits_BT, torch.zeros(3, 2), weights_BT).backward()
    assert logits_BT.grad is not None
    assert logits_BT.grad.ne(0).equal(weights_BT.ne(0))


def test_attention_without_a_hidden_layer_is_refused() -> None:
    with pytest.raises(ValidationError, match="hidden"):
        Din(history="past", hidden=())


def test_an_interest_without_a_target_is_refused() -> None:
    schema = FeatureSchema(
        tables=(TableConfig(name="item", num_embeddings=9),),
        sparse=(SparseFeature(name="item_id", table="item"),),
        dense=(DenseFeature(name="age"),),
        histories=(HistoryConfig(name="past"),),
        sequences=(SequenceFeature(name="past_item", history="past", table="item"),),
    )
    config = ModelConfig(interests=(Din(history="past"),))
    with pytest.raises(UserError, match=r"'past' names a target.*'past_item'"):
        Ranker(schema, config, num_tasks=1, autocast=False)

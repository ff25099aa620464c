"""Recurrent and attention interests against one sample and one event at a time."""

import pytest
import torch
from torch import Tensor, nn

from embedding.config import Identity, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from ranking.dien import InterestEvolution
from ranking.history import HistoryInterest
from ranking.hstu import Block, SequenceTransduction
from ranking.interest import TargetAttention
from ranking.interest_config import Dien, Hstu

# float32 sums of up to some hundred terms of order one, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = [2, 0, 9, 5, 1, 0, 4, 9]
QUERY, SIDE, GAPS = 6, 3, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _inputs() -> list[Tensor]:
    num_events = sum(LENGTHS)
    shapes = [(len(LENGTHS), QUERY), (num_events, QUERY), (num_events, SIDE)]
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def _agree(block: nn.Module, inputs: list[Tensor], runs: list) -> None:
    """All runs give the same interests, and the same gradients everywhere."""
    outputs, gradients = [], []
    weights = torch.randn(len(LENGTHS), block.output_dim)
    leaves = [*inputs, *block.parameters()]
    for run in runs:
        interest_BX = run()
        outputs.append(interest_BX)
        gradients.append(torch.autograd.grad((interest_BX * weights).sum(), leaves))
    for output, gradient in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(output, outputs[0], **CLOSE)
        for ours, theirs in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert all(gradient.any() for gradient in gradients[0])


def _cell(x: Tensor, h: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Candidate state and update gate of a GRU: (reset, update, new)."""
    of_x, of_h, bias_x, bias_h = parameters
    (xr, xz, xn), (hr, hz, hn) = (of_x @ x + bias_x).chunk(3), (of_h @ h + bias_h).chunk(3)
    reset = torch.sigmoid(xr + hr)
    return reset, torch.sigmoid(xz + hz), torch.tanh(xn + reset * hn)


def _dien_by_loop(
    block: InterestEvolution, query_BD: Tensor, keys_ND: Tensor, side_NS: Tensor
) -> Tensor:
    gru, augru = block.extractor, block.evolution
    first = [gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0]
    second = [augru.input.weight, augru.state.weight, augru.input.bias, augru.state.bias]
    rows, start = [], 0
    for query, length in zip(query_BD, LENGTHS, strict=True):
        h, states = torch.zeros(block.output_dim), []
        for n in range(start, start + length):
            _, update, new = _cell(torch.cat([keys_ND[n], side_NS[n]]), h, first)
            h = (1 - update) * new + update * h
            states.append(h)
        start += length
        h = torch.zeros(block.output_dim)
        if states:
            scores = torch.stack([state @ (block.query.weight @ query) for state in states])
            for weight, state in zip(scores.softmax(0), states, strict=True):
                _, update, new = _cell(state, h, second)
                h = (1 - weight * update) * h + weight * update * new
        rows.append(h)
    return torch.stack(rows)


def test_interest_evolution_equals_a_loop_with_gradients() -> None:
    block = InterestEvolution(QUERY, SIDE, 7)
    inputs = _inputs()
    runs = [
        lambda: block(*inputs, torch.tensor(LENGTHS)),
        lambda: _dien_by_loop(block, *inputs),
    ]
    _agree(block, inputs, runs)


def test_interest_evolution_of_empty_histories_is_zero() -> None:
    block = InterestEvolution(QUERY, SIDE, 7)
    out = block(torch.randn(3, QUERY), torch.empty(0, QUERY), torch.empty(0, SIDE), torch.zeros(3))
    assert out.equal(torch.zeros(3, 7))


@pytest.mark.parametrize("kind", ["din", "dien", "hstu"])
def test_without_any_event_a_batch_still_reaches_everything_that_is_trained(kind: str) -> None:
    """Data parallelism waits for the gradient of every parameter, and so do sharded tables."""
    block: nn.Module = {
        "din": TargetAttention(QUERY, SIDE, (4,), softmax=True),
        "dien": InterestEvolution(QUERY, SIDE, 7),
        "hstu": SequenceTransduction(
            QUERY, SIDE, Hstu(history="past"), max_length=9, num_gaps=None
        ),
    }[kind]
    inputs = [torch.randn(3, QUERY), torch.empty(0, QUERY), torch.empty(0, SIDE)]
    leaves = [x.requires_grad_() for x in inputs] + list(block.parameters())
    out = block(*inputs, torch.zeros(3, dtype=torch.int64))
    gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)


def _block_by_loop(block: Block, x_SD: Tensor, gaps: list[int] | None) -> Tensor:
    """One token, one head and one earlier token at a time."""
    heads = block.num_heads
    projected = [nn.functional.silu(block.projections(block.norm(x))) for x in x_SD]
    gate, q, k, v = zip(*(p.chunk(4) for p in projected), strict=True)
    rows = []
    for i, x in enumerate(x_SD):
        attended = []
        for head in range(heads):
            total = torch.zeros(len(v[0]) // heads)
            for j in range(i + 1):
                q_i, k_j, v_j = (part.chunk(heads)[head] for part in (q[i], k[j], v[j]))
                score = q_i @ k_j + block.position_bias_HS[head, i - j]
                if gaps is not None:
                    score = score + block.gap_bias_HGG[head, gaps[i], gaps[j]]
                total = total + nn.functional.silu(score) / block.num_positions * v_j
            attended.append(total)
        normed = block.attended_norm(torch.cat(attended))
        rows.append(x + block.output(normed * gate[i]))
    return torch.stack(rows)


def _hstu_by_loop(
    block: SequenceTransduction, inputs: list[Tensor], gaps_N: Tensor | None
) -> Tensor:
    query_BD, keys_ND, side_NS = inputs
    rows, start = [], 0
    for query, length in zip(query_BD, LENGTHS, strict=True):
        events = range(start, start + length)
        tokens = [block.event(torch.cat([keys_ND[n], side_NS[n]])) for n in events]
        x_SD = torch.stack([*tokens, block.candidate(query)])
        gaps = None if gaps_N is None else [int(gaps_N[n]) for n in events] + [1]
        for layer in block.blocks:
            x_SD = _block_by_loop(layer, x_SD, gaps)
        rows.append(x_SD[-1])
        start += length
    return torch.stack(rows)


@pytest.mark.parametrize("with_gaps", [False, True])
def test_transduction_equals_a_loop_with_gradients_on_both_kernels(with_gaps: bool) -> None:
    config = Hstu(history="past", num_layers=2, dim=8, num_heads=2, head_dim=4)
    block = SequenceTransduction(
        QUERY, SIDE, config, max_length=9, num_gaps=GAPS if with_gaps else None
    )
    gaps_N = torch.randint(0, GAPS, (sum(LENGTHS),)) if with_gaps else None
    with torch.no_grad():
        for layer in block.blocks:  # biases start at 0 and would show nothing
            layer.position_bias_HS.normal_()
            if with_gaps:
                layer.gap_bias_HGG.normal_()
    inputs = _inputs()

    def run(kernel: str) -> Tensor:
        block.kernel = kernel
        return block(*inputs, torch.tensor(LENGTHS), gaps_N)

    runs = [lambda: _hstu_by_loop(block, inputs, gaps_N), lambda: run("fbgemm")]
    _agree(block, inputs, [*runs, lambda: run("torch")])


def test_an_interest_does_not_depend_on_the_rest_of_the_batch() -> None:
    config = Hstu(history="past", num_layers=2)
    block = SequenceTransduction(QUERY, SIDE, config, max_length=9, num_gaps=None)
    query_BD, keys_ND, side_NS = _inputs()
    together = block(query_BD, keys_ND, side_NS, torch.tensor(LENGTHS))
    alone = block(query_BD[6:7], keys_ND[17:21], side_NS[17:21], torch.tensor(LENGTHS[6:7]))
    torch.testing.assert_close(together[6:7], alone, **CLOSE)


def _schema(gap: TableConfig) -> FeatureSchema:
    return FeatureSchema(
        tables=(TableConfig(name="item", num_embeddings=9), gap),
        sparse=(SparseFeature(name="item_id", table="item"),),
        histories=(HistoryConfig(name="past", max_length=9),),
        sequences=(
            SequenceFeature(name="past_item", history="past", table="item", target="item_id"),
            SequenceFeature(name="past_gap", history="past", table="gap", source="gap"),
        ),
    )


def test_a_gap_that_cannot_bias_attention_is_refused_with_the_remedy() -> None:
    schema = _schema(TableConfig(name="gap", num_embeddings=34, ids=Identity()))
    with pytest.raises(UserError, match=r"gap 'past_item' is not .*\['past_gap'\]; name one"):
        HistoryInterest(schema, Hstu(history="past", gap="past_item"))
    HistoryInterest(schema, Hstu(history="past", gap="past_gap"))
    hashed = _schema(TableConfig(name="gap", num_embeddings=34))
    with pytest.raises(UserError, match=r"hashed ids and 34 rows.*set ids: \{kind: identity\}"):
        HistoryInterest(hashed, Hstu(history="past", gap="past_gap"))


@pytest.mark.parametrize("config", [Dien(history="past"), Hstu(history="past")])
def test_interests_have_the_width_they_say(config: Dien | Hstu) -> None:
    schema = _schema(TableConfig(name="gap", num_embeddings=34, ids=Identity()))
    interest = HistoryInterest(schema, config)
    block = interest.block
    out = block(torch.randn(2, 16), torch.randn(3, 16), torch.randn(3, 16), torch.tensor([0, 3]))
    assert out.shape == (2, interest.output_dim)


def test_bf16_products_come_close_to_float32() -> None:
    sizes = (QUERY, SIDE)
    blocks = [
        InterestEvolution(*sizes, 8),
        SequenceTransduction(*sizes, Hstu(history="past", gap="g"), max_length=9, num_gaps=GAPS),
    ]
    gaps_N = torch.randint(0, GAPS, (sum(LENGTHS),))
    for block in blocks:
        inputs = [*_inputs(), torch.tensor(LENGTHS)]
        if isinstance(block, SequenceTransduction):
            inputs.append(gaps_N)
        exact_BX = block(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded_BX = block(*inputs)
        rounded_BX.float().sum().backward()
        torch.testing.assert_close(rounded_BX.float(), exact_BX, rtol=0.05, atol=0.05)  # 8 bits
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())

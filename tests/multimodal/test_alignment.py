"""Contrastive alignment: the loss against loops, the cached step against the plain one."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding.errors import UserError
from multimodal.codes.alignment import AlignmentStep, PairItems, alignment_loss
from multimodal.codes.pair_sampler import PairSampler
from multimodal.token_batch import ModalityTokens, TokenBatch
from tests.distributed import run_distributed

NUM_ITEMS, NUM_TOKENS, WIDTH, DIM = 30, 4, 6, 5
TEMPERATURE = 0.2


class Encoder(nn.Module):
    """Mean token through two layers; one parameter is used by some items only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, DIM))
        self.absent = nn.Parameter(torch.randn(WIDTH))

    def forward(self, batch: TokenBatch) -> Tensor:
        part = batch.modalities["text"]
        weight = part.mask_UL.float() / part.mask_UL.sum(1, keepdim=True).clamp(min=1)
        mean = (part.tokens_ULH * weight.unsqueeze(2)).sum(1)
        return self.layers(torch.where(part.present.unsqueeze(1), mean, self.absent))


def tokens() -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, NUM_TOKENS + 1, (NUM_ITEMS, 1), generator=generator)
    values = torch.randn(NUM_ITEMS, NUM_TOKENS, WIDTH, generator=generator)
    return TokenBatch({"text": ModalityTokens(values, torch.arange(NUM_TOKENS) < lengths)})


def read(rows: Tensor) -> TokenBatch:
    part = tokens().modalities["text"]
    return TokenBatch({"text": ModalityTokens(part.tokens_ULH[rows], part.mask_UL[rows])})


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Many pairs share an item, so that columns must be left out."""
    generator = torch.Generator().manual_seed(4)
    trigger, target = torch.randint(0, 14, (2, count), generator=generator)
    return trigger, target


def log_shares() -> Tensor:
    """(2, N): of triggers and of targets, which differ."""
    scores = torch.arange(NUM_ITEMS) / 7.0
    return torch.log_softmax(torch.stack([scores, scores.flip(0)]), dim=1)


def pair_items(trigger: Tensor, target: Tensor) -> PairItems:
    of_triggers, of_targets = log_shares()
    return PairItems(trigger, target, of_triggers[trigger], of_targets[target])


def naive_loss(vectors: list[Tensor], trigger: list[int], target: list[int]) -> float:
    of_triggers, of_targets = log_shares().tolist()
    total = 0.0
    for row in range(len(trigger)):
        for mine, others, share in ((trigger, target, of_targets), (target, trigger, of_triggers)):
            scores = {}
            for column, item in enumerate(others):
                if column == row or item not in (trigger[row], target[row]):
                    cosine = nn.functional.cosine_similarity(
                        vectors[mine[row]], vectors[item], dim=0
                    )
                    scores[column] = float(cosine) / TEMPERATURE - share[item]
            largest = max(scores.values())
            normaliser = sum(math.exp(score - largest) for score in scores.values())
            total += largest + math.log(normaliser) - scores[row]
    return total / (2 * len(trigger))


def test_loss_equals_a_loop_over_pairs_and_negatives() -> None:
    torch.manual_seed(1)
    vectors = torch.randn(NUM_ITEMS, DIM)
    trigger, target = pairs(12)
    items = pair_items(trigger, target)
    unit = nn.functional.normalize(vectors, dim=1)

    parts = [
        alignment_loss(unit[trigger], unit[target], items, torch.tensor(TEMPERATURE), rows)
        for rows in (slice(0, 5), slice(5, 12))
    ]

    expected = naive_loss(list(vectors), trigger.tolist(), target.tolist())
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-5)


def alignment_step(items_per_chunk: int | None, device: str) -> AlignmentStep:
    """With the encoder on a device, and tokens and rows of items on the CPU, as readers give."""
    return AlignmentStep(
        Encoder().to(device),
        read,
        log_share_2N=log_shares().to(device),
        log_temperature=nn.Parameter(torch.tensor(math.log(TEMPERATURE), device=device)),
        items_per_chunk=items_per_chunk,
    )


def gradients(
    items_per_chunk: int | None, share: slice, device: str = "cpu"
) -> tuple[float, dict[str, Tensor]]:
    step = alignment_step(items_per_chunk, device)
    trigger, target = pairs(12)
    loss = step.backward(trigger[share], target[share], seed=[1])
    trained = {**dict(step.encoder.named_parameters()), "temperature": step.log_temperature}
    return loss, {name: p.grad.cpu() for name, p in trained.items() if p.grad is not None}


def plain_gradients() -> tuple[float, dict[str, Tensor]]:
    """Autograd through everything at once."""
    encoder, log_temperature = Encoder(), nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
    trigger, target = pairs(12)
    unit = nn.functional.normalize(encoder(tokens()), dim=1)
    items = pair_items(trigger, target)
    loss = alignment_loss(
        unit[trigger], unit[target], items, log_temperature.exp(), slice(0, len(trigger))
    )
    loss.backward()
    found = {name: p.grad for name, p in encoder.named_parameters()}
    return float(loss.detach()), {**found, "temperature": log_temperature.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("items_per_chunk", [None, 1, 5])
def test_cached_gradients_equal_the_plain_ones(items_per_chunk: int | None) -> None:
    loss, found = gradients(items_per_chunk, slice(0, 12))
    expected_loss, expected = plain_gradients()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert all(float(grad.abs().max()) > 0 for grad in found.values())


def test_a_step_runs_where_the_encoder_is() -> None:
    step = alignment_step(5, "meta")
    # The one thing that a tensor without values cannot do comes last: to say what the loss is.
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        step.backward(*pairs(12), seed=[1])
    assert all(p.grad is not None and p.grad.is_meta for p in step.encoder.parameters())


@pytest.mark.integration
def test_two_ranks_have_the_gradients_of_one_process() -> None:
    run_distributed(_check_ranks, 2)


def _check_ranks() -> None:
    rank = dist.get_rank()
    loss, found = gradients(4, slice(6 * rank, 6 * rank + 6))
    expected_loss, expected = plain_gradients()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_dropout_is_the_same_in_both_passes() -> None:
    class Dropped(Encoder):
        seen: list[Tensor] = []  # noqa: RUF012

        def forward(self, batch: TokenBatch) -> Tensor:
            vectors = nn.functional.dropout(super().forward(batch), 0.5)
            self.seen.append(vectors.detach())
            return vectors

    encoder = Dropped()
    step = AlignmentStep(
        encoder,
        read,
        log_share_2N=torch.zeros(2, NUM_ITEMS),
        log_temperature=torch.tensor(-1.0),
        items_per_chunk=5,
    )
    before = torch.get_rng_state()
    step.backward(*pairs(12), seed=[1])
    first, second = encoder.seen[: len(encoder.seen) // 2], encoder.seen[len(encoder.seen) // 2 :]
    assert len(first) == len(second) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_reproducible_and_kinds_take_equal_shares() -> None:
    kinds = [
        np.stack([np.arange(0, 5), np.arange(5, 10)], axis=1).astype(np.int32),
        np.stack([np.full(90, 10), np.arange(90) % 3 + 11], axis=1).astype(np.int32),
    ]
    sampler = PairSampler(kinds, NUM_ITEMS, seed=2)
    trigger, target = sampler.batch(7, 1001)
    again = PairSampler(kinds, NUM_ITEMS, seed=2).batch(7, 1001)
    assert torch.equal(trigger, again[0])
    assert torch.equal(target, again[1])
    assert not torch.equal(trigger, sampler.batch(8, 1001)[0])
    first_kind = trigger < 5
    assert int(first_kind.sum()) == 501
    assert torch.equal(target[first_kind], trigger[first_kind] + 5)
    # Half of the drawn pairs are of the second kind, whose trigger is item 10.
    of_triggers, of_targets = sampler.log_share_2N
    assert float(of_triggers[10].exp()) == pytest.approx(0.5)
    assert of_triggers[:5].exp().tolist() == pytest.approx([0.1] * 5)
    assert of_targets[5:10].exp().tolist() == pytest.approx([0.1] * 5)
    assert of_targets[11:14].exp().tolist() == pytest.approx([1 / 6] * 3)
    assert of_triggers[5:10].tolist() == [0.0] * 5
    assert of_targets[14:].tolist() == [0.0] * 16
    with pytest.raises(UserError, match="no pair of items has content on both sides"):
        PairSampler([], NUM_ITEMS, seed=0)

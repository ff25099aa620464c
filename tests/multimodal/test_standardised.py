"""Standardised outputs: what they are, and what they save contrastive training from."""

import pytest
import torch
from torch import nn

from multimodal.codes.alignment import AlignmentStep
from multimodal.content_config import ConcatFusion, ContentConfig, ImageTower, TextTower
from multimodal.content_encoder import (
    ContentEncoder,
    load_content_encoder,
    load_trained_state,
    trained_state,
)
from multimodal.fusion import ConcatOfModalities
from multimodal.token_batch import ModalityTokens, TokenBatch
from tests.multimodal.small_models import random_tokens, without

CONFIG = ContentConfig(text=TextTower(lora=None), fusion=ConcatFusion(), dim=8)
NUM_ITEMS = 60


def catalogue(width: int) -> TokenBatch:
    """Items of six kinds that all point the same way, as mean tokens of towers do."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randn(6, 1, width, generator=generator)[torch.arange(NUM_ITEMS) % 6]
    noise = torch.randn(NUM_ITEMS, 3, width, generator=generator)
    common = 30 * torch.randn(width, generator=generator)
    common[0] = 0
    values = common + kind + noise
    values[:, :, 0] = 2.5  # a constant dimension
    return TokenBatch({"text": ModalityTokens(values, torch.ones(NUM_ITEMS, 3, dtype=torch.bool))})


def read_of(encoder: ContentEncoder):
    part = catalogue(encoder.output.in_features).modalities["text"]
    return lambda rows: TokenBatch(
        {"text": ModalityTokens(part.tokens_ULH[rows], part.mask_UL[rows])}
    )


def test_inputs_of_the_last_layer_have_mean_0_and_deviation_1() -> None:
    encoder = load_content_encoder(CONFIG)
    read = read_of(encoder)
    weight = encoder.output.weight.detach().clone()
    fused = encoder.fused(read(torch.arange(NUM_ITEMS))).detach()

    parts = torch.arange(NUM_ITEMS).split(7)  # moments of parts add up
    encoder.standardise(torch.stack([encoder.moments(read, part) for part in parts]).sum(0))

    found = encoder.output.standardised(fused)
    moving = fused.std(0) > 1e-5
    expected = (fused - fused.mean(0)) / fused.std(0, correction=0)
    torch.testing.assert_close(found[:, moving], expected[:, moving], rtol=1e-3, atol=1e-4)
    assert torch.equal(encoder.output.weight, weight)
    assert torch.isfinite(encoder(read(torch.arange(4)))).all()


def test_state_brings_a_fresh_encoder_to_the_same_vectors() -> None:
    encoder = load_content_encoder(CONFIG)
    read, rows = read_of(encoder), torch.arange(NUM_ITEMS)
    encoder.standardise(encoder.moments(read, rows))
    with torch.no_grad():
        encoder.output.weight.mul_(1.5)
    other = load_content_encoder(CONFIG)
    load_trained_state(other, trained_state(encoder))
    torch.testing.assert_close(other(read(rows)), encoder(read(rows)), rtol=0, atol=0)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_items_without_a_picture_neither_move_nor_widen_those_of_the_others(
    is_frozen: bool,
) -> None:
    config = ContentConfig(
        text=TextTower(lora=None),
        image=ImageTower(lora=None),
        fusion=ConcatFusion(),
        dim=8,
        frozen=is_frozen,
    )
    generator = torch.Generator().manual_seed(1)
    tokens = random_tokens(40)
    image = tokens.modalities["image"]
    shifted = ModalityTokens(image.tokens_ULH + 30, image.mask_UL)
    lacking = torch.randperm(40, generator=generator)[:12]
    batch = without(TokenBatch({**tokens.modalities, "image": shifted}), "image", lacking.tolist())
    rows, width = torch.arange(40), image.tokens_ULH.shape[2]
    encoder = load_content_encoder(config)

    def read(rows_U: torch.Tensor) -> TokenBatch:
        parts = batch.modalities.items()
        return TokenBatch(
            {n: ModalityTokens(p.tokens_ULH[rows_U], p.mask_UL[rows_U]) for n, p in parts}
        )

    encoder.standardise(encoder.moments(read, rows))

    restored = load_content_encoder(config)
    load_trained_state(restored, trained_state(encoder))
    means = shifted.tokens_ULH.mean(dim=1)
    having = torch.isin(rows, lacking, invert=True)
    expected = torch.zeros(40, width)
    expected[having] = (means[having] - means[having].mean(0)) / means[having].std(0, correction=0)
    for each in (encoder, restored):
        assert isinstance(each.fusion, ConcatOfModalities)
        parts = each.output.standardised(each.fused(read(rows))).split(width, dim=1)
        found = dict(zip(each.fusion.absent_H, parts, strict=True))["image"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def same_kind_hits(encoder: ContentEncoder, read) -> float:
    """Share of items whose nearest other item is of their kind."""
    vectors = nn.functional.normalize(encoder(read(torch.arange(NUM_ITEMS))), dim=1)
    scores = (vectors @ vectors.T).fill_diagonal_(-2)
    nearest = scores.argmax(1)
    return float((nearest % 6 == torch.arange(NUM_ITEMS) % 6).float().mean())


def test_training_brings_items_of_a_kind_together() -> None:
    encoder = load_content_encoder(CONFIG)
    read = read_of(encoder)
    encoder.standardise(encoder.moments(read, torch.arange(NUM_ITEMS)))
    before = same_kind_hits(encoder, read)
    step = AlignmentStep(
        encoder,
        read,
        log_share_2N=torch.zeros(2, NUM_ITEMS),
        log_temperature=torch.tensor(0.1).log(),
        items_per_chunk=16,
    )
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for number in range(40):
        trigger = torch.randint(0, 30, (48,), generator=generator)
        target = (trigger + 6 * torch.randint(1, 5, (48,), generator=generator)) % 30
        optimizer.zero_grad()
        losses.append(step.backward(trigger, target, seed=[number]))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert same_kind_hits(encoder, read) > max(before, 0.6)

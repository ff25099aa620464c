"""Counted cost of the encoder and its loss against formulas of their layers."""

import pytest

from multimodal.cic import CicLoss
from multimodal.content_config import Cic, ContentConfig
from multimodal.content_encoder import load_content_encoder
from multimodal.content_timing import cic_cost, encoder_cost
from tests.multimodal.small_models import tiny_config

TOKENS, HIDDEN, INNER, RANK, DIM = 6, 32, 64, 4, 8
"""Of the tiny text tower (`multimodal.tower_files.TINY_SIZE`), and of the configurations here."""


def text_config(**changes: object) -> ContentConfig:
    text = {"max_tokens": TOKENS, "lora": {"rank": RANK}}
    return ContentConfig.model_validate({"text": text, "dim": DIM, "cic": None, **changes})


def test_flops_of_a_text_tower_with_lora_are_those_of_its_products() -> None:
    """One BERT layer with LoRA on query and value, then the mean token and its projection."""
    cost = encoder_cost(text_config(fusion={"kind": "mean"}))

    square = 2 * TOKENS * HIDDEN * HIDDEN
    feed_forward = 2 * (2 * TOKENS * HIDDEN * INNER)
    scores = 2 * TOKENS * TOKENS * HIDDEN
    lora = 2 * TOKENS * HIDDEN * RANK
    mean = 2 * TOKENS * HIDDEN
    projection = 2 * HIDDEN * DIM
    # Query, key, value, output; scores, and values by them; two adapters of two products each.
    forward = 4 * square + 2 * scores + feed_forward + 4 * lora + mean + projection
    assert cost.forward_flops == forward
    # Frozen weights get no gradient, and the stored tokens need none: behind the attention only
    # what flows through. Of the attention all but the keys' gradient; of LoRA, gradients of both
    # matrices, and of what lies between them.
    backward = square + feed_forward + 3 * scores + 2 * (2 * lora + lora) + mean + 2 * projection
    assert cost.backward_flops == backward
    # A and B of two adapters, projection, absent; the last layer is the ranks'.
    assert cost.parameters == 2 * (2 * RANK * HIDDEN) + (HIDDEN + 1) * DIM + DIM
    assert cost.fused_width == DIM


def test_flops_of_an_fq_former_over_a_frozen_tower() -> None:
    queries = 3
    config = text_config(
        text={"max_tokens": TOKENS, "lora": None},
        fusion={"kind": "fq_former", "num_queries": queries, "num_heads": 2},
    )
    cost = encoder_cost(config)

    joint = queries + TOKENS
    projection = 2 * TOKENS * HIDDEN * DIM
    of_queries = 2 * (2 * queries * DIM * DIM)
    keys_and_values = 2 * joint * DIM * 2 * DIM
    attention = 2 * (2 * queries * joint * DIM)
    behind = of_queries + keys_and_values + attention
    assert cost.forward_flops == projection + behind
    # Twice each, but tokens of a frozen tower need no gradient.
    assert cost.backward_flops == projection + 2 * behind


def test_memory_is_that_of_tokens_weights_and_at_least_what_backward_needs() -> None:
    config = tiny_config(cic=None)
    cost = encoder_cost(config)
    encoder = load_content_encoder(config)
    held = (*encoder.parameters(), *encoder.buffers())
    assert cost.weight_bytes == sum(part.numel() * part.element_size() for part in held)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert cost.parameters == trained - sum(p.numel() for p in encoder.output.parameters())
    # 32 words, and 16 patches with a class token, in half precision with a mask.
    positions = 32 + 17
    assert cost.token_bytes == positions * (2 * HIDDEN + 1)
    # The layer's input and the wide activation of its feed-forward block, in single precision.
    assert cost.activation_bytes > positions * 4 * (HIDDEN + INNER)
    assert cost.activation_bytes < positions * 4 * 100 * INNER
    assert min(cost.forward_s, cost.backward_s, cost.head_s) > 0
    assert min(cost.forward_operations, cost.backward_operations) > 20


@pytest.mark.parametrize("negatives", ["uniform", "in_batch", "queue"])
def test_flops_of_the_contrastive_loss(negatives: str) -> None:
    dim, width, num_negatives = 8, 12, 5
    config = Cic(negatives=negatives, num_negatives=num_negatives, queue_size=64)
    cost = cic_cost(CicLoss(config, dim, width))
    heads = 3 * 2 * (dim * dim + dim * width)
    assert cost.parameters == dim * dim + dim * width
    if negatives != "in_batch":
        # Scores against the negatives, both ways, and gradients of who asks and, but for those of
        # the queue, of the negatives.
        assert cost.flops_per_pair == pytest.approx(0, abs=1e-6)
        products = 2 if negatives == "queue" else 3
        each = products * 2 * (2 * num_negatives * dim)
        assert cost.flops_per_item == pytest.approx(heads + each)
        assert cost.bytes_per_pair < 1
    else:
        # All similarities, and the gradients of both sides.
        assert cost.flops_per_pair == pytest.approx(3 * 2 * dim)
        assert cost.flops_per_item == pytest.approx(heads)
        # The similarities and their gradient, at least; at most a handful of them.
        assert 2 * 4 <= cost.bytes_per_pair <= 6 * 4
    assert cost.flops(10) == pytest.approx(10 * cost.flops_per_item + 100 * cost.flops_per_pair)
    assert cost.cpu_s_per_flop > 0

"""How many items a training step encodes, with the default bound and with none."""

from typing import Any

import pytest
import torch

from embedding.items import ItemRows
from multimodal.content_bank import ContentBank
from multimodal.content_config import Gradient
from multimodal.content_encoder import load_content_encoder
from multimodal.content_head import ContentHead
from multimodal.content_learner import ContentLearner
from multimodal.content_source import TrainedContent
from multimodal.inline_encoder import InlineEncoder
from multimodal.rank_group import RankGroup
from multimodal.token_batch import ModalityTokens, TokenBatch
from tests.multimodal.small_models import random_tokens, tiny_config

NUM_ITEMS = 530
TOKENS = random_tokens(NUM_ITEMS)
CPU = torch.device("cpu")


def read_tokens(rows_U: torch.Tensor) -> TokenBatch:
    return TokenBatch(
        {
            name: ModalityTokens(part.tokens_ULH[rows_U], part.mask_UL[rows_U])
            for name, part in TOKENS.modalities.items()
        }
    )


@pytest.mark.parametrize(("bound", "expected"), [({}, 512), ({"max_items_per_step": None}, 530)])
def test_a_step_with_gradient_of_all_items_encodes_what_the_bound_allows(
    bound: dict[str, Any], expected: int
) -> None:
    config = tiny_config(gradient={"items": "all", **bound}, cic=None)
    encoder = load_content_encoder(config)
    learner = ContentLearner(config, encoder, read_tokens, CPU)
    ranks = RankGroup()
    head = ContentHead(learner.head(), config, ranks, CPU)
    bank = ContentBank(torch.arange(NUM_ITEMS), head.width, CPU)
    placement = InlineEncoder(learner, ranks)
    content = TrainedContent(config, placement, head=head, bank=bank, ranks=ranks)
    before = {name: p.detach().clone() for name, p in learner.encoder.named_parameters()}
    past = torch.arange(100, NUM_ITEMS)
    items = ItemRows.of(torch.arange(100), {"past": (past, torch.tensor([len(past)] + [0] * 99))})

    content.train(items).vectors_UD.square().sum().backward()
    content.learn(1.0)

    assert content.metrics()["content/encoded_items"] == expected
    moved = [n for n, p in learner.encoder.named_parameters() if not p.detach().equal(before[n])]
    assert any("lora_B" in name for name in moved)
    assert Gradient().max_items_per_step == 512  # what the docstring of `items` says

"""Where a host asks for TF32, what is published is computed in fp32 all the same."""

from collections.abc import Iterator

import pytest
import torch

from embedding.precision import exact_products
from multimodal.content_encoder import load_content_encoder
from multimodal.content_learner import ContentLearner
from multimodal.token_batch import TokenBatch
from tests.multimodal.small_models import random_tokens, tiny_config

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=[False, True])
def asked(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether TF32 is on."""
    before = MATMUL.allow_tf32
    MATMUL.allow_tf32 = request.param
    yield request.param
    MATMUL.allow_tf32 = before


def test_vectors_of_exact_encoding_are_made_without_tf32(asked: bool) -> None:
    seen: list[bool] = []

    def read(_: torch.Tensor) -> TokenBatch:
        seen.append(MATMUL.allow_tf32)
        return random_tokens(4)

    config = tiny_config()
    learner = ContentLearner(config, load_content_encoder(config), read, torch.device("cpu"))
    for exact in (True, False):
        learner.encode(torch.arange(4), exact=exact)
    assert seen == [False, asked]
    assert MATMUL.allow_tf32 == asked


def test_the_setting_comes_back_after_an_error(asked: bool) -> None:
    def fail() -> None:
        with exact_products():
            assert MATMUL.fp32_precision != "tf32"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert MATMUL.allow_tf32 == asked

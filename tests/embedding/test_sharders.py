"""What the wire makes of vectors and of their gradients."""

import pytest
import torch
from torchrec.distributed.types import CommOp

from embedding.config import ShardingConfig
from embedding.planning.sharders import make_sharders

BATCH_SIZE = 65_536


@pytest.mark.parametrize(
    ("device_type", "communication", "bits"),
    [("cpu", "fp16", 23), ("cuda", "fp16", 7), ("cuda", "bf16", 7)],
)
def test_gradients_of_negatives_cross_the_wire(
    device_type: str, communication: str, bits: int
) -> None:
    """A prediction of 0.03 for a negative of a large batch, whose loss is a mean."""
    sharding = ShardingConfig(communication=communication)
    registry = make_sharders(sharding, device_type)[0].qcomm_codecs_registry
    generator = torch.Generator().manual_seed(0)
    gradients = 0.03 * 0.05 * torch.randn(10_000, generator=generator) / BATCH_SIZE
    for op in CommOp:
        if op.name not in registry:
            continue
        codec = registry[op.name].backward
        received = codec.decode(codec.encode(gradients))
        torch.testing.assert_close(received, gradients, rtol=2.0**-bits, atol=0)
        vectors = registry[op.name].forward
        expected = {"fp16": torch.float16, "bf16": torch.bfloat16}[communication]
        assert vectors.quantized_dtype == expected

"""Rows of one byte an element: fbgemm's fused 8-bit row-wise format, as torch's kernels read it.

    D codes (uint8) | scale (float32) | bias (float32)        element = code * scale + bias

Bias is the smallest element of a row, scale a 255th of its range.
"""

# Shapes: R rows, D embedding dim, W = D + 8 bytes of a row.

import torch
from torch import Tensor

SCALE_AND_BIAS_BYTES = 8


def quantized_rows(weight_RD: Tensor) -> Tensor:
    """Rows (R, W) of finite values; each is off by at most half of its row's scale, and rounding.

    A value that is not finite would get a code like any other.
    """
    packed: Tensor = torch.ops.quantized.embedding_bag_byte_prepack(weight_RD.float())
    return packed


def empty_rows(num_rows: int, embedding_dim: int) -> Tensor:
    """Memory (R, W) for a table."""
    return torch.empty(num_rows, embedding_dim + SCALE_AND_BIAS_BYTES, dtype=torch.uint8)

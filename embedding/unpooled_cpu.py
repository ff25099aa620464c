"""Data-parallel sequence tables on CPU: a lookup the FBGEMM kernel gets wrong there."""

# Shapes: F features of a kernel, B samples, N ids, D embedding dim.

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection


def mend_unpooled_lookups(model: nn.Module) -> None:
    """Replace the dense kernel's unpooled lookup on CPU by plain indexing.

    The CPU kernel ignores `PoolingMode.NONE` and sums each sample's rows; on CUDA it is right.
    """
    for module in model.modules():
        if not isinstance(module, ShardedEmbeddingCollection):
            continue
        for lookup in module._lookups:
            if not isinstance(lookup, DistributedDataParallel):
                continue
            for kernel in lookup.module._emb_modules:
                if not kernel._emb_module.weights.is_cuda:
                    kernel._emb_module.forward = partial(_look_up, kernel._emb_module)


def _look_up(kernel: Any, indices: Tensor, offsets: Tensor, **_unused: None) -> Tensor:
    """Rows (N, D) of `indices`, which are feature-major with `offsets` (F * B + 1)."""
    feature_starts_F = kernel.weights_offsets  # in elements; all tables of the kernel have dim D
    num_features, dim = feature_starts_F.numel(), kernel.max_D
    batch_size = (offsets.numel() - 1) // num_features
    counts_F = (
        offsets[::batch_size].diff() if batch_size else feature_starts_F.new_zeros(num_features)
    )
    first_row_N = (feature_starts_F // dim).repeat_interleave(counts_F.long())
    return embedding(indices.long() + first_row_N, kernel.weights.view(-1, dim))

"""FGCNN: a convolution over the fields generates new features for any classifier.

fields E' (B, F, D) -> [conv over fields -> tanh -> max-pool] -> recombination -> new features
                                    |-> next block
"""

# Shapes: B samples, F fields, D embedding dim, C maps, H fields a block reads or leaves,
# N new features of one block,
# X maps of one height side by side (D * C).

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ranking.fgcnn_config import Fgcnn


class FeatureGenerator(nn.Module):
    """The generator of FGCNN (arXiv 1904.04447).

    Maps stay in memory as (B, H, D, C), channels last: the layout in which the convolution is
    fastest on CPU and GPU, and in which pooling and recombination need no copy.
    """

    order_F: Tensor | None

    def __init__(self, config: Fgcnn, num_fields: int, dim: int) -> None:
        super().__init__()
        heights = (num_fields, *config.pooled_heights(num_fields))
        maps = (1, *config.maps)
        num_new = config.num_new_features(num_fields)
        self.dim = dim
        self.num_features = sum(num_new)
        order = None
        if config.shuffle_seed is not None:
            draw = torch.Generator().manual_seed(config.shuffle_seed)
            order = torch.randperm(num_fields, generator=draw)
        self.register_buffer("order_F", order, persistent=False)
        self.blocks, self.recombinations = nn.ModuleList(), nn.ModuleList()
        for block in range(len(config.maps)):
            inputs, outputs = (maps[block], heights[block]), (maps[block + 1], heights[block + 1])
            self.blocks.append(
                ConvolutionBlock(config, block, maps[block])
                if config.blocks == "cnn"
                else DenseBlock(dim, inputs, outputs)
            )
            width = math.prod(outputs) * dim
            self.recombinations.append(
                nn.Sequential(nn.Linear(width, num_new[block] * dim), nn.Tanh())
                if config.recombination
                else MapsAsFeatures(dim, maps[block + 1])
            )

        self.apply(_start_without_bias)

    def forward(self, fields_BFD: Tensor) -> list[Tensor]:
        """The new features of every block, (B, N * D) each."""
        if self.order_F is not None:
            fields_BFD = fields_BFD.index_select(1, self.order_F)
        # One map with the strides of channels last, which unsqueeze(1) would not have.
        maps_BCHD = fields_BFD.unsqueeze(3).permute(0, 3, 1, 2)
        features = []
        for block, recombination in zip(self.blocks, self.recombinations, strict=True):
            maps_BCHD = block(maps_BCHD)
            features.append(recombination(maps_BCHD.permute(0, 2, 3, 1).flatten(1)))
        return features


def _start_without_bias(module: nn.Module) -> None:
    """Embeddings start small: beside torch's random biases, no map would show them at first."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        assert module.bias is not None
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ConvolutionBlock(nn.Module):
    """Convolution over the feature axis, batch norm as an option, tanh, max-pooling."""

    def __init__(self, config: Fgcnn, block: int, in_maps: int) -> None:
        super().__init__()
        height = config.heights[block]
        # An even kernel reaches one field further down than up, as torch's `same` padding does.
        self.padding = ((height - 1) // 2, height // 2)
        self.convolution = nn.Conv2d(in_maps, config.maps[block], (height, 1))
        self.norm = nn.BatchNorm2d(config.maps[block]) if config.batch_norm else None
        self.pool = config.pools[block]
        self.ceil = config.pool_rounding == "ceil"

    def forward(self, maps_BCHD: Tensor) -> Tensor:
        """The pooled maps; the height shrinks by the pool."""
        maps_BCHD = maps_BCHD.contiguous(memory_format=torch.channels_last)
        weight = self.convolution.weight
        # Two views, so that the weight's gradient has the strides that DDP's buckets expect.
        weight = weight.flatten(1).unflatten(1, weight.shape[1:])
        above, below = self.padding
        if above != below:
            maps_BCHD = nn.functional.pad(maps_BCHD, (0, 0, 0, below - above))
        maps_BCHD = nn.functional.conv2d(
            maps_BCHD, weight, self.convolution.bias, padding=(above, 0)
        )
        if self.norm is not None:
            maps_BCHD = self.norm(maps_BCHD)
        return pool_tanh(maps_BCHD, self.pool, ceil=self.ceil)


class DenseBlock(nn.Module):
    """Ablation: a dense layer from all of the block's inputs to maps of the pooled shape."""

    def __init__(self, dim: int, inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
        """`inputs` and `outputs` are (maps, height)."""
        super().__init__()
        self.shape = (outputs[1], dim, outputs[0])
        self.linear = nn.Linear(math.prod(inputs) * dim, math.prod(outputs) * dim)

    def forward(self, maps_BCHD: Tensor) -> Tensor:
        """Maps (B, C, H, D), channels last."""
        hidden_BX = self.linear(maps_BCHD.permute(0, 2, 3, 1).flatten(1)).tanh()
        return hidden_BX.view(-1, *self.shape).permute(0, 3, 1, 2)


class MapsAsFeatures(nn.Module):
    """Ablation: every map at every height is a new feature."""

    def __init__(self, dim: int, maps: int) -> None:
        super().__init__()
        self.shape = (dim, maps)

    def forward(self, maps_BX: Tensor) -> Tensor:
        """From the flat (H, D, C) to the flat (H, C, D)."""
        return maps_BX.unflatten(1, (-1, *self.shape)).transpose(2, 3).flatten(1)


def pool_tanh(maps_BCHD: Tensor, pool: int, *, ceil: bool) -> Tensor:
    """Tanh and max-pooling of `pool` neighbours along H, channels last.

    Pooled first, as tanh is monotonic: 1 / `pool` of the work, the same result.
    """
    if torch.compiler.is_compiling():
        return pool_tanh_plain(maps_BCHD, pool, ceil=ceil)
    maps_BHX = maps_BCHD.permute(0, 2, 3, 1).flatten(2)
    batch, channels, _, dim = maps_BCHD.shape
    pooled_BHX: Tensor = _PoolTanh.apply(maps_BHX, pool, ceil)
    return pooled_BHX.view(batch, -1, dim, channels).permute(0, 3, 1, 2)


def pool_tanh_plain(maps_BCHD: Tensor, pool: int, *, ceil: bool) -> Tensor:
    """What `pool_tanh` computes, in torch's own operators."""
    return nn.functional.max_pool2d(maps_BCHD.tanh(), (pool, 1), ceil_mode=ceil)


class _PoolTanh(torch.autograd.Function):
    """Few and vectorised passes: autograd's own cost more than the convolution itself.

    Which member of a window wins is kept as 0 or 1 in the maps' own dtype, which multiplies much
    faster on CPU than a bool selects. Of equal members the first wins.
    """

    @staticmethod
    def forward(ctx: Any, maps_BHX: Tensor, pool: int, ceil: bool) -> Tensor:
        num_full, left = divmod(maps_BHX.shape[1], pool)
        height = num_full + int(ceil and left > 0)
        pooled_BHX = maps_BHX.new_empty(maps_BHX.shape[0], height, maps_BHX.shape[2])
        wins: list[Tensor] = []
        for rows, members in _windows(maps_BHX, pool, ceil):
            best = members[0]
            for member in members[1:]:
                wins.append(best.new_empty(best.shape))
                torch.gt(member, best, out=wins[-1])
                best = torch.maximum(member, best, out=pooled_BHX[:, rows])
            if len(members) == 1:
                pooled_BHX[:, rows] = best
        pooled_BHX.tanh_()
        ctx.save_for_backward(pooled_BHX, *wins)
        ctx.shape, ctx.pool, ctx.ceil = maps_BHX.shape, pool, ceil
        return pooled_BHX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pooled_BHX, *wins = ctx.saved_tensors
        left_BHX = torch.ops.aten.tanh_backward(grads[0].contiguous(), pooled_BHX)
        # Rows that `floor` leaves out have no gradient.
        empty = torch.empty if ctx.ceil or ctx.shape[1] % ctx.pool == 0 else torch.zeros
        grad_BHX = empty(ctx.shape, dtype=left_BHX.dtype, device=left_BHX.device)
        masks = iter(wins)
        for rows, members in _windows(grad_BHX, ctx.pool, ctx.ceil):
            left = left_BHX[:, rows]
            taken = [(member, next(masks)) for member in members[1:]]
            for member, win in reversed(taken):
                torch.mul(left, win, out=member)
                left.sub_(member)
            members[0].copy_(left)
        return grad_BHX, None, None


def _windows(maps_BHX: Tensor, pool: int, ceil: bool) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """(rows of the pooled maps, views of the members of their windows)."""
    num_full, left = divmod(maps_BHX.shape[1], pool)
    if num_full:
        full = maps_BHX[:, : num_full * pool].unflatten(1, (num_full, pool))
        yield slice(0, num_full), full.unbind(2)
    if left and ceil:
        rest = maps_BHX[:, num_full * pool :].unsqueeze(1)
        yield slice(num_full, num_full + 1), rest.unbind(2)

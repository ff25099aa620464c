"""Runs the content encoder and its loss on made-up tokens, to count and time what they cost."""

# Shapes: U items, L token positions, H width of a tower or of the fused vectors, D content dim,
# X width of an ID embedding.

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embedding.precision import cpu_has_bf16
from multimodal.cic import CicLoss
from multimodal.content_config import ContentConfig, TextTower
from multimodal.content_cost import CicCost, EncoderCost
from multimodal.content_encoder import ContentEncoder
from multimodal.standardised import StandardisedLinear
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.token_store import DTYPES
from multimodal.tower_files import Tower
from multimodal.towers import SplitTower, load_tower
from multimodal.work_meter import WorkMeter, seconds_on_one_core

_COUNTED_ITEMS = 2
_HELD_ITEMS = (4, 8)
_TIMED_ITEMS = (8, 64)
_ENOUGH_S = 0.2
"""What takes less is timed with more items: small towers spend their time between products."""
_HEAD_ITEMS = 1024
_CIC_ITEMS = (128, 256, 512)


def encoder_cost(config: ContentConfig, *, timed: bool = True) -> EncoderCost:
    """Cost of one item in a recipe's encoder, with as many tokens as an item can have.

    Flops are those of `torch.utils.flop_counter`: 2 a multiplication and addition. Unless `timed`,
    seconds are 0.

    Raises:
        UserError: a tower cannot be loaded or adapted.
    """
    splits = {name: load_tower(tower, seed=config.seed) for name, tower in config.towers.items()}
    encoder = ContentEncoder(config, {name: split.upper for name, split in splits.items()})
    # In one piece: what micro batches compute again depends on the number of items.
    encoder.micro_batch_items = None
    encoder.train()
    sizes = {
        name: (_num_tokens(config.towers[name], split), split.upper.hidden_size)
        for name, split in splits.items()
    }

    def run(num_items: int, precision: str = config.precision) -> _Run:
        return _Run(encoder, _tokens(config, sizes, num_items), precision)

    forward_flops, backward_flops = run(_COUNTED_ITEMS).flops()
    few, many = (run(num_items).metered() for num_items in _HELD_ITEMS)
    held = (many.peak_bytes - few.peak_bytes) / (_HELD_ITEMS[1] - _HELD_ITEMS[0])
    # A CPU that only emulates bf16 refuses to train in it, and may still plan for GPUs.
    precision = config.precision if cpu_has_bf16() else "fp32"
    forward_s = backward_s = head_s = 0.0
    if timed:
        forward_s, backward_s = _seconds(lambda num_items: run(num_items, precision))
        head_s = _head_seconds(encoder.output)
    one = _tokens(config, sizes, 1).modalities.values()
    return EncoderCost(
        forward_flops=forward_flops / _COUNTED_ITEMS,
        backward_flops=backward_flops / _COUNTED_ITEMS,
        forward_operations=few.forward,
        backward_operations=few.backward,
        forward_s=forward_s,
        backward_s=backward_s,
        activation_bytes=held,
        token_bytes=sum(part.tokens_ULH.nbytes + part.mask_UL.nbytes for part in one),
        weight_bytes=sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers())),
        parameters=sum(
            p.numel()
            for name, p in encoder.named_parameters()
            if p.requires_grad and not name.startswith("output.")
        ),
        fused_width=encoder.output.in_features,
        head_s=head_s,
    )


class _Metered(NamedTuple):
    """Operations of both passes, and the most bytes alive at once."""

    forward: int
    backward: int
    peak_bytes: int


class _Run:
    """Forward and backward of an encoder on the same tokens."""

    def __init__(self, encoder: ContentEncoder, tokens: TokenBatch, precision: str) -> None:
        self.encoder, self.tokens = encoder, tokens
        self.reduced = precision == "bf16"
        self.fused_UH: Tensor | None = None

    def forward(self) -> None:
        self.encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.reduced):
            self.fused_UH = self.encoder.fused(self.tokens).float()

    def backward(self) -> None:
        assert self.fused_UH is not None
        if self.fused_UH.requires_grad:  # not where all of it is frozen
            self.fused_UH.backward(torch.ones_like(self.fused_UH))
        self.fused_UH = None

    def flops(self) -> tuple[int, int]:
        """Of both passes. The counter knows no attention kernel of the CPU: plain products do."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.forward()
            forward = counter.get_total_flops()
            self.backward()
            return forward, counter.get_total_flops() - forward

    def metered(self) -> _Metered:
        """As training runs it, with whatever attention kernel."""
        with WorkMeter() as meter:
            self.forward()
            forward = meter.operations
            self.backward()
        return _Metered(forward, meter.operations - forward, meter.peak_bytes)


def _seconds(run: Callable[[int], _Run]) -> tuple[float, float]:
    """Of one item, forward and backward."""
    for num_items in _TIMED_ITEMS:
        timed = run(num_items)
        forward_s, backward_s = seconds_on_one_core(timed.forward, timed.backward)
        if forward_s + backward_s > _ENOUGH_S:
            break
    return forward_s / num_items, backward_s / num_items


def _head_seconds(layer: StandardisedLinear) -> float:
    """Of one item, forward and backward."""
    fused_UH = torch.randn(_HEAD_ITEMS, layer.in_features, requires_grad=True)
    vectors: list[Tensor] = []

    def forward() -> None:
        vectors[:] = [layer(fused_UH)]

    def backward() -> None:
        vectors[0].backward(torch.ones_like(vectors[0]))

    return sum(seconds_on_one_core(forward, backward)) / _HEAD_ITEMS


def _tokens(config: ContentConfig, sizes: dict[str, tuple[int, int]], num_items: int) -> TokenBatch:
    """Random tokens of items that have all of them, as they come from the store."""
    modalities = {}
    for name, (length, width) in sizes.items():
        dtype = DTYPES[config.towers[name].precision]
        tokens_ULH = torch.randn(num_items, length, width).to(dtype)
        mask_UL = torch.ones(num_items, length, dtype=torch.bool)
        modalities[name] = ModalityTokens(tokens_ULH, mask_UL)
    return TokenBatch(modalities)


def _num_tokens(tower: Tower, split: SplitTower) -> int:
    if isinstance(tower, TextTower):
        return tower.max_tokens
    size = tower.image_size
    return split.lower({"pixel_values": torch.zeros(1, 3, size, size)}).shape[1]


def cic_cost(loss: CicLoss, *, timed: bool = True) -> CicCost:
    """Cost of the contrastive loss, with both sides' gradients; unless `timed`, seconds are 0."""
    counted = [_cic_run(loss, count) for count in _CIC_ITEMS]
    per_pair, per_item, _ = _quadratic([flops for flops, _ in counted])
    pair_bytes, item_bytes, _ = _quadratic([meter.peak_bytes for _, meter in counted])
    seconds = 0.0
    if timed:
        sides = _cic_sides(loss, _CIC_ITEMS[-1])
        (seconds,) = seconds_on_one_core(lambda: loss(*sides).backward())
    return CicCost(
        flops_per_item=per_item,
        flops_per_pair=per_pair,
        bytes_per_item=item_bytes,
        bytes_per_pair=pair_bytes,
        operations=counted[0][1].operations,
        cpu_s_per_flop=seconds / counted[-1][0],
        parameters=sum(p.numel() for p in loss.parameters()),
    )


def _cic_run(loss: CicLoss, num_items: int) -> tuple[int, WorkMeter]:
    sides = _cic_sides(loss, num_items)
    with FlopCounterMode(display=False) as counter, WorkMeter() as meter:
        loss(*sides).backward()
    return counter.get_total_flops(), meter


def _cic_sides(loss: CicLoss, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Content vectors, ID embeddings and items of so many candidates, all distinct."""
    content_UD = torch.randn(num_items, loss.content_head.in_features, requires_grad=True)
    ids_UX = torch.randn(num_items, loss.id_head.in_features, requires_grad=True)
    return content_UD, ids_UX, torch.arange(num_items)


def _quadratic(values: list[float]) -> tuple[float, float, float]:
    """Coefficients, none below zero, of the polynomial through the values at `_CIC_ITEMS`."""
    square, linear, constant = np.polyfit(_CIC_ITEMS, values, 2).clip(min=0)
    return float(square), float(linear), float(constant)

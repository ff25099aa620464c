"""The product of xDeepFM's interaction network: outer products, weighed, without keeping them."""

# Shapes: R rows (samples times embedding columns), H maps in, O maps out, F fields.

from typing import Any

import torch
from torch import Tensor, nn

_CPU_ROWS = 512
"""Outer products of so many rows stay in the cache."""
_GPU_BYTES = 256 * 2**20
"""Of outer products at a time: a GPU wants few and large kernels, and has memory for them."""


class InteractionLayer(nn.Module):
    """One layer of the compressed interaction network of xDeepFM (arXiv 1803.05170).

    Neither bias nor activation, as in the paper: its maps are polynomials of the fields, and it
    found no activation better than none.
    """

    def __init__(self, in_maps: int, num_fields: int, out_maps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_maps * num_fields, out_maps, bias=False)

    def forward(self, maps_RH: Tensor, fields_RF: Tensor) -> Tensor:
        """The next maps, (R, O)."""
        return compress(maps_RH, fields_RF, self.linear.weight)


def compress(maps_RH: Tensor, fields_RF: Tensor, weight_OX: Tensor) -> Tensor:
    """out[r, o] = sum over h, f of weight[o, h * F + f] * maps[r, h] * fields[r, f]; (R, O).

    All outer products at once would take H * F values a row, in forward and again in backward:
    gigabytes for a batch of thousands. They are formed for some rows at a time, and again in
    backward, which also takes half the time.
    """
    weight_OX = weight_OX.to(maps_RH.dtype)
    if torch.compiler.is_compiling():
        return compress_plain(maps_RH, fields_RF, weight_OX)
    compressed_RO: Tensor = _Compression.apply(maps_RH, fields_RF, weight_OX)
    return compressed_RO


def compress_plain(maps_RH: Tensor, fields_RF: Tensor, weight_OX: Tensor) -> Tensor:
    """What `compress` computes, all rows at once."""
    return nn.functional.linear(_outer(maps_RH, fields_RF), weight_OX)


def _outer(maps_RH: Tensor, fields_RF: Tensor) -> Tensor:
    return (maps_RH.unsqueeze(2) * fields_RF.unsqueeze(1)).flatten(1)


class _Compression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps_RH: Tensor, fields_RF: Tensor, weight_OX: Tensor) -> Tensor:
        out_RO = maps_RH.new_empty(maps_RH.shape[0], weight_OX.shape[0])
        for rows in _chunks(maps_RH, fields_RF):
            outer_RX = _outer(maps_RH[rows], fields_RF[rows])
            torch.mm(outer_RX, weight_OX.t(), out=out_RO[rows])
        ctx.save_for_backward(maps_RH, fields_RF, weight_OX)
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps_RH, fields_RF, weight_OX = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        maps_grad_RH, fields_grad_RF = torch.empty_like(maps_RH), torch.empty_like(fields_RF)
        # In float32, as many small parts are added up.
        weight_grad_OX = torch.zeros_like(weight_OX, dtype=torch.float32)
        for rows in _chunks(maps_RH, fields_RF):
            maps, fields, grad = maps_RH[rows], fields_RF[rows], grad_RO[rows]
            weight_grad_OX += grad.t() @ _outer(maps, fields)
            outer_grad_RHF = (grad @ weight_OX).unflatten(1, (-1, fields.shape[1]))
            maps_grad_RH[rows] = torch.bmm(outer_grad_RHF, fields.unsqueeze(2)).squeeze(2)
            fields_grad_RF[rows] = torch.bmm(maps.unsqueeze(1), outer_grad_RHF).squeeze(1)
        return maps_grad_RH, fields_grad_RF, weight_grad_OX.to(weight_OX.dtype)


def _chunks(maps_RH: Tensor, fields_RF: Tensor) -> list[slice]:
    bytes_per_row = maps_RH.shape[1] * fields_RF.shape[1] * maps_RH.element_size()
    size = chunk_rows(maps_RH.device.type, bytes_per_row)
    return [slice(start, start + size) for start in range(0, maps_RH.shape[0], size)]


def chunk_rows(device_type: str, bytes_per_row: int) -> int:
    """Rows whose outer products are formed at a time."""
    return _CPU_ROWS if device_type == "cpu" else max(1, _GPU_BYTES // bytes_per_row)

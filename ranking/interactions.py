"""Explicit feature interactions: cross layers, factorisation machine, products of all pairs."""

# Shapes: B samples, F fields, D embedding dim, X any width, R rank of the cross weights, P pairs of
# fields, M half of the fields.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """Cross layers of DCN-v2 (arXiv 2008.13535): x_{l+1} = x_0 * (W x_l + b) + x_l.

    With a rank R, W = U V with V (R, X) and U (X, R).
    """

    def __init__(self, dim: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(dim, dim)
            if rank is None
            else nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))
            for _ in range(num_layers)
        )
        self.is_full = rank is None

    def forward(self, x_BX: Tensor) -> Tensor:
        """Crossed features, (B, X)."""
        if self.is_full and not torch.compiler.is_compiling():
            weights = [layer.weight.to(x_BX.dtype) for layer in self.layers]
            biases = [layer.bias.to(x_BX.dtype) for layer in self.layers]
            crossed_BX: Tensor = _CrossLayers.apply(x_BX, *weights, *biases)
            return crossed_BX
        crossed_BX = x_BX
        for layer in self.layers:
            crossed_BX = torch.addcmul(crossed_BX, x_BX, layer(crossed_BX))
        return crossed_BX


class _CrossLayers(torch.autograd.Function):
    """All full layers with few passes over memory: gradients add up inside the products."""

    @staticmethod
    def forward(ctx: Any, x_BX: Tensor, *weights_and_biases: Tensor) -> Tensor:
        half = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:half], weights_and_biases[half:]
        crossed, mapped = [x_BX], []
        for weight_XX, bias_X in zip(weights, biases, strict=True):
            mapped.append(nn.functional.linear(crossed[-1], weight_XX, bias_X))
            crossed.append(torch.addcmul(crossed[-1], x_BX, mapped[-1]))
        ctx.save_for_backward(*weights, *crossed[:-1], *mapped)
        return crossed[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        half = len(ctx.saved_tensors) // 3
        weights, crossed = ctx.saved_tensors[:half], ctx.saved_tensors[half : 2 * half]
        mapped, x_BX = ctx.saved_tensors[2 * half :], crossed[0]
        (grad_BX,) = grads
        grad_x_BX = torch.zeros_like(grad_BX)
        grad_weights, grad_biases = [], []
        for weight_XX, crossed_BX, mapped_BX in reversed(
            list(zip(weights, crossed, mapped, strict=True))
        ):
            grad_mapped_BX = grad_BX * x_BX
            grad_x_BX.addcmul_(grad_BX, mapped_BX)
            grad_weights.append(grad_mapped_BX.t() @ crossed_BX)
            grad_biases.append(grad_mapped_BX.sum(dim=0))
            grad_BX = torch.addmm(grad_BX, grad_mapped_BX, weight_XX)
        return (grad_x_BX.add_(grad_BX), *reversed(grad_weights), *reversed(grad_biases))


def fm_second_order(fields_BFD: Tensor) -> Tensor:
    """Sum of the inner products of all pairs of fields, (B, 1) float32, in time linear in F.

    The identity of Rendle's factorisation machines: 2 sum_{a<b} <v_a, v_b> = |sum v|^2 - sum |v|^2.
    """
    # In float32, as the two squares nearly cancel, and as the sum is part of a logit.
    wide_BFD = fields_BFD.float()
    square_of_sum_BD = wide_BFD.sum(dim=1).square()
    sum_of_squares_BD = wide_BFD.square().sum(dim=1)
    return 0.5 * (square_of_sum_BD - sum_of_squares_BD).sum(dim=1, keepdim=True)


class InnerProducts(nn.Module):
    """Inner products of all pairs of fields, each pair once, without an (F, F) matrix a sample.

    The fields are cut in two halves of M. Products between the halves need no packing; those
    inside the first half (upper triangle) and inside the second (lower triangle) fill one
    (M, M - 1) block together, and so do their gradients. An odd last field follows behind.
    """

    upper_MX: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.num_fields = num_fields
        half = num_fields // 2
        columns_X = torch.arange(max(half - 1, 0))
        upper_MX = (columns_X >= torch.arange(half).unsqueeze(1)).float()
        self.register_buffer("upper_MX", upper_MX, persistent=False)

    @property
    def num_pairs(self) -> int:
        """F (F - 1) / 2."""
        return self.num_fields * (self.num_fields - 1) // 2

    def pairs(self) -> list[tuple[int, int]]:
        """The fields of every product, in the order of the output."""
        half = self.num_fields // 2
        listed = []
        for row in range(half):
            for column in range(half - 1):
                in_first = column >= row
                listed.append((row, column + 1) if in_first else (half + column, half + row))
            listed += [(row, half + column) for column in range(half)]
        if self.num_fields % 2:
            listed += [(field, self.num_fields - 1) for field in range(self.num_fields - 1)]
        return listed

    def forward(self, fields_BFD: Tensor, beside: Sequence[Tensor] = ()) -> Tensor:
        """The products with `beside` behind them, (B, P + their columns); all of one dtype."""
        half = self.num_fields // 2
        halves_BFD = fields_BFD[:, : 2 * half]
        if self.num_fields % 2:
            last_BDX = fields_BFD[:, 2 * half :].transpose(1, 2)
            beside = [torch.bmm(halves_BFD, last_BDX).squeeze(2), *beside]
        upper_MX = self.upper_MX.to(fields_BFD.dtype)
        if not half:
            return torch.cat(list(beside), dim=1)
        if torch.compiler.is_compiling():
            return torch.cat([packed_products(halves_BFD, upper_MX), *beside], dim=1)
        products_BX: Tensor = _PackedProducts.apply(halves_BFD, upper_MX, *beside)
        return products_BX


def packed_products(fields_BFD: Tensor, upper_MX: Tensor) -> Tensor:
    """What `_PackedProducts` computes of the fields, in torch's own operators."""
    first, second = fields_BFD.chunk(2, dim=1)
    inside_first = torch.bmm(first, first.transpose(1, 2))[:, :, 1:]
    inside_second = torch.bmm(second, second.transpose(1, 2))[:, :, :-1]
    inside = inside_first * upper_MX + inside_second * (1 - upper_MX)
    across = torch.bmm(first, second.transpose(1, 2))
    return torch.cat([inside, across], dim=2).flatten(1)


class _PackedProducts(torch.autograd.Function):
    """Products written where the layer behind reads them, gradients where the next product does.

    0 and 1 as factors: on CPU they are several times as fast as a selection.
    """

    @staticmethod
    def forward(ctx: Any, fields_BFD: Tensor, upper_MX: Tensor, *beside: Tensor) -> Tensor:
        first, second = fields_BFD.chunk(2, dim=1)
        half = first.shape[1]
        ctx.widths = [half * (2 * half - 1), *(part.shape[1] for part in beside)]
        ctx.save_for_backward(fields_BFD, upper_MX)
        flat_BX = fields_BFD.new_empty(len(fields_BFD), sum(ctx.widths))
        packed_BP, *rest = flat_BX.split(ctx.widths, dim=1)
        inside, across = _inside_and_across(packed_BP, half)
        torch.mul(torch.bmm(first, first.transpose(1, 2))[:, :, 1:], upper_MX, out=inside)
        inside.addcmul_(torch.bmm(second, second.transpose(1, 2))[:, :, :-1], 1 - upper_MX)
        across.copy_(torch.bmm(first, second.transpose(1, 2)))
        for target, part in zip(rest, beside, strict=True):
            target.copy_(part)
        return flat_BX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fields_BFD, upper_MX = ctx.saved_tensors
        first, second = fields_BFD.chunk(2, dim=1)
        half = first.shape[1]
        packed_BP, *rest = grads[0].split(ctx.widths, dim=1)
        inside, across = _inside_and_across(packed_BP, half)
        across = across.contiguous()
        square = across.new_zeros(len(across), half, half)
        torch.mul(inside, upper_MX, out=square[:, :, 1:])
        grad_first = torch.bmm(square + square.transpose(1, 2), first)
        square[:, :, half - 1 :] = 0
        torch.mul(inside, 1 - upper_MX, out=square[:, :, :-1])
        grad_second = torch.bmm(square + square.transpose(1, 2), second)
        grad_first = grad_first.baddbmm_(across, second)
        grad_second = grad_second.baddbmm_(across.transpose(1, 2), first)
        return (torch.cat([grad_first, grad_second], dim=1), None, *rest)


def _inside_and_across(packed_BP: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the products inside the halves (B, M, M - 1) and between them (B, M, M)."""
    block = packed_BP.unflatten(1, (half, 2 * half - 1))
    return block[:, :, : half - 1], block[:, :, half - 1 :]


class FieldPairs(nn.Module):
    """The vectors of both fields of all pairs a < b."""

    left_P: Tensor
    right_P: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        left_P, right_P = torch.triu_indices(num_fields, num_fields, offset=1)
        self.num_pairs = len(left_P)
        self.register_buffer("left_P", left_P, persistent=False)
        self.register_buffer("right_P", right_P, persistent=False)

    def forward(self, left_BFD: Tensor, right_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """(P, B, D) of field a in the first and of field b in the second.

        Pairs come first: whole (B, D) blocks are copied, and layers of one weight a pair read them
        as they are.
        """
        left_FBD, right_FBD = left_BFD.transpose(0, 1), right_BFD.transpose(0, 1)
        return (
            left_FBD.contiguous().index_select(0, self.left_P),
            right_FBD.contiguous().index_select(0, self.right_P),
        )


def flat_pairs(pairs: Sequence[Tensor]) -> Tensor:
    """Tensors (P, B, X) as one (B, P * X) side by side."""
    return torch.cat([pair_PBX.transpose(0, 1).flatten(1) for pair_PBX in pairs], dim=1)

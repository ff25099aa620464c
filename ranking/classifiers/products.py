"""Classifiers that put an MLP on the products of all pairs of fields."""

# Shapes: B samples, F fields, D embedding dim, P pairs of fields, X any width.

import math

import torch
from torch import Tensor, nn

from ranking.classifier_config import Dlrm, FiBiNet, Ipnn, Opnn, Pin
from ranking.classifiers.inputs import ClassifierInputs, InputDims, filled, filled_width
from ranking.experts import StackedLinear
from ranking.interactions import FieldPairs, InnerProducts, flat_pairs
from ranking.mlp import mlp


class IpnnClassifier(nn.Module):
    """Inner-product network (arXiv 1611.00144): MLP on all inner products and on everything."""

    def __init__(self, config: Ipnn, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("ipnn")
        self.products = InnerProducts(dims.num_fields)
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat(self.products.num_pairs), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        beside = inputs.parts(self.products.num_pairs)
        return self.mlp(self.products(inputs.stacked(self.dim), beside))


class OpnnClassifier(nn.Module):
    """Outer-product network (arXiv 1611.00144) with a kernel a pair (arXiv 1807.00311).

    The product of a pair is <K_ab, e_a e_b^T> = e_a^T K_ab e_b, so no outer product is formed. A
    kernel that is a number scales the inner product, so no vector of a pair is formed either.
    """

    order_P: Tensor

    def __init__(self, config: Opnn, dims: InputDims) -> None:
        super().__init__()
        self.dim = dim = dims.common_field_dim("opnn")
        self.kind = config.kernel
        if self.kind == "number":
            self.products = InnerProducts(dims.num_fields)
            listed = self.products.pairs()
            order_P = torch.tensor(sorted(range(len(listed)), key=listed.__getitem__))
            self.register_buffer("order_P", order_P, persistent=False)
        else:
            self.pairs = FieldPairs(dims.num_fields)
        num_pairs = math.comb(dims.num_fields, 2)
        shape = {"matrix": (dim, dim), "vector": (1, dim), "number": (1, 1)}[self.kind]
        bound = 1 / math.sqrt(dim)
        self.kernels = nn.Parameter(torch.empty(num_pairs, *shape).uniform_(-bound, bound))
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat(num_pairs), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        fields_BFD = inputs.stacked(self.dim)
        if self.kind == "number":
            products_BP = self.products(fields_BFD)
            ordered_BP = products_BP.gather(1, self.order_P.expand_as(products_BP))
            return self.mlp(inputs.flat(ordered_BP * self.kernels.flatten().to(ordered_BP.dtype)))
        left_PBD, right_PBD = self.pairs(fields_BFD, fields_BFD)
        kernels = self.kernels.to(left_PBD.dtype)
        matrix = self.kind == "matrix"
        mapped_PBD = torch.bmm(left_PBD, kernels) if matrix else left_PBD * kernels
        return self.mlp(inputs.flat((mapped_PBD * right_PBD).sum(dim=2).t()))


class PinClassifier(nn.Module):
    """Product-network in network (arXiv 1807.00311): a small network on every pair, then an MLP.

    The network of a pair reads both vectors and their product.
    """

    def __init__(self, config: Pin, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("pin")
        self.pairs = FieldPairs(dims.num_fields)
        num_pairs = self.pairs.num_pairs
        self.hidden = StackedLinear(num_pairs, 3 * self.dim, config.pair_hidden)
        self.output = StackedLinear(num_pairs, config.pair_hidden, config.pair_dim)
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat(num_pairs * config.pair_dim), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        fields_BFD = inputs.stacked(self.dim)
        left_PBD, right_PBD = self.pairs(fields_BFD, fields_BFD)
        pairs_PBX = torch.cat([left_PBD, right_PBD, left_PBD * right_PBD], dim=2)
        small_PBX = self.output(self.hidden(pairs_PBX).relu_()).relu_()
        return self.mlp(inputs.flat(flat_pairs([small_PBX])))


class DlrmClassifier(nn.Module):
    """DLRM (arXiv 1906.00091): products of all pairs of fields and the dense features' vector.

    The MLP on top reads the products, the dense features' vector and the interests.
    """

    def __init__(self, config: Dlrm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("dlrm")
        self.bottom = (
            mlp(dims.num_dense, (*config.bottom_hidden, self.dim)) if dims.num_dense else None
        )
        self.products = InnerProducts(dims.num_fields + (self.bottom is not None))
        width = self.products.num_pairs + dims.interest + (self.dim if self.bottom else 0)
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(filled_width(width), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        fields_BFD = inputs.stacked(self.dim)
        columns = [inputs.interests_BX]
        if self.bottom is not None:
            dense_BD = self.bottom(inputs.dense_BX)
            fields_BFD = torch.cat([dense_BD.unsqueeze(1), fields_BFD], dim=1)
            columns.append(dense_BD)
        return self.mlp(self.products(fields_BFD, filled(columns, self.products.num_pairs)))


class FiBiNetClassifier(nn.Module):
    """FiBiNET (arXiv 1905.09433): bilinear products of raw and of reweighted fields, MLP on top.

    The product of a pair is (e_a W) * e_b, a vector; W is one for all, one a field or one a pair.
    """

    def __init__(self, config: FiBiNet, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("fibinet")
        num_fields = dims.num_fields
        squeezed = max(1, num_fields // config.reduction)
        self.excitation = nn.Sequential(
            *(nn.Linear(num_fields, squeezed), nn.ReLU()),
            *(nn.Linear(squeezed, num_fields), nn.ReLU()),
        )
        self.pairs = FieldPairs(num_fields)
        self.kind = config.bilinear
        count = {"all": 1, "each": num_fields, "interaction": self.pairs.num_pairs}[self.kind]
        bound = 1 / math.sqrt(self.dim)
        start = torch.empty(2, count, self.dim, self.dim).uniform_(-bound, bound)
        self.bilinear = nn.Parameter(start)
        width = 2 * self.pairs.num_pairs * self.dim
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat(width), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        fields_BFD = inputs.stacked(self.dim)
        weights_BF = self.excitation(fields_BFD.mean(dim=2))
        weighted_BFD = fields_BFD * weights_BF.unsqueeze(2)
        products = [
            self._products(fields_BFD, self.bilinear[0]),
            self._products(weighted_BFD, self.bilinear[1]),
        ]
        return self.mlp(inputs.flat(flat_pairs(products)))

    def _products(self, fields_BFD: Tensor, weights: Tensor) -> Tensor:
        """(P, B, D)."""
        if self.kind == "interaction":
            left_PBD, right_PBD = self.pairs(fields_BFD, fields_BFD)
            return torch.bmm(left_PBD, weights) * right_PBD
        if self.kind == "all":
            mapped_BFD = torch.matmul(fields_BFD, weights[0])
        else:
            mapped_BFD = torch.bmm(fields_BFD.transpose(0, 1), weights).transpose(0, 1)
        left_PBD, right_PBD = self.pairs(mapped_BFD, fields_BFD)
        return left_PBD * right_PBD

"""Classifiers that build maps over all fields, layer by layer: CCPM, CIN, self-attention."""

# Shapes: B samples, F fields, D embedding dim, H heads or maps, C channels, X any width,
# R samples times embedding columns.

import torch
from torch import Tensor, nn

from ranking.cin import InteractionLayer
from ranking.classifier_config import AutoInt, Ccpm, XDeepFm
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.mlp import in_float32, mlp

_LAST_POOL = 3  # fields that CCPM keeps after its last layer


class CcpmClassifier(nn.Module):
    """CCPM (doi 10.1145/2806416.2806603): convolutions over neighbouring fields, k-max pooling.

    Layer i of l keeps the (1 - (i / l)^(l - i)) F largest values of every map and column, in the
    fields' order, and the last one 3.
    """

    def __init__(self, config: Ccpm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("ccpm")
        maps = (1, *config.maps)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(maps[i], maps[i + 1], (height, 1), padding=(height - 1, 0))
            for i, height in enumerate(config.heights)
        )
        self.kept: list[int] = []
        num_layers, rows = len(config.maps), dims.num_fields
        for layer, height in enumerate(config.heights, start=1):
            share = 1 - (layer / num_layers) ** (num_layers - layer)
            wanted = max(_LAST_POOL, int(share * dims.num_fields))
            rows = min(wanted, rows + height - 1)
            self.kept.append(rows)
        self.first_order = nn.Linear(dims.flat(), 1)
        self.output_dim = rows * self.dim * config.maps[-1] + 1

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): pooled maps, first order."""
        maps_BCFD = inputs.stacked(self.dim).unsqueeze(1)
        for convolution, kept in zip(self.convolutions, self.kept, strict=True):
            maps_BCFD = k_max(convolution(maps_BCFD), kept).tanh()
        first_B1 = in_float32(self.first_order, inputs.flat())
        return torch.cat([maps_BCFD.flatten(1), first_B1], dim=1)


def k_max(maps_BCFD: Tensor, k: int) -> Tensor:
    """The k largest values along F, in their order."""
    largest = maps_BCFD.topk(k, dim=2, sorted=False).indices.sort(dim=2).values
    return maps_BCFD.gather(2, largest)


class XDeepFmClassifier(nn.Module):
    """xDeepFM: compressed interaction network (`ranking.cin`), MLP and first-order term."""

    def __init__(self, config: XDeepFm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("xdeepfm")
        widths = (dims.num_fields, *config.maps)
        self.layers = nn.ModuleList(
            InteractionLayer(widths[i], dims.num_fields, widths[i + 1])
            for i in range(len(config.maps))
        )
        self.first_order = nn.Linear(dims.flat(), 1)
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)
        self.output_dim = sum(config.maps) + config.hidden[-1] + 1

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): interaction maps, hidden units, first order."""
        # A CIN layer works on every embedding column by itself: columns are rows of its product.
        fields_RF = inputs.stacked(self.dim).transpose(1, 2).flatten(0, 1)
        maps_RH = fields_RF
        sums = []
        for layer in self.layers:
            maps_RH = layer(maps_RH, fields_RF)
            sums.append(maps_RH.unflatten(0, (-1, self.dim)).sum(dim=1, dtype=torch.float32))
        flat_BX = inputs.flat()
        first_B1 = in_float32(self.first_order, flat_BX)
        return torch.cat([*sums, self.mlp(flat_BX), first_B1], dim=1)


class AutoIntClassifier(nn.Module):
    """AutoInt+ (arXiv 1810.11921): self-attention between the fields, beside an MLP."""

    def __init__(self, config: AutoInt, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("autoint")
        width = config.num_heads * config.head_dim
        self.layers = nn.ModuleList(
            FieldAttention(self.dim if layer == 0 else width, config.num_heads, config.head_dim)
            for layer in range(config.num_layers)
        )
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)
        self.output_dim = dims.num_fields * width + config.hidden[-1]

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): attended fields, hidden units."""
        fields_BFX = inputs.stacked(self.dim)
        for layer in self.layers:
            fields_BFX = layer(fields_BFX)
        return torch.cat([fields_BFX.flatten(1), self.mlp(inputs.flat())], dim=1)


class FieldAttention(nn.Module):
    """One interacting layer: unscaled dot-product attention, a linear residual, ReLU."""

    def __init__(self, in_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.input = nn.Linear(in_dim, 4 * num_heads * head_dim, bias=False)

    def forward(self, fields_BFX: Tensor) -> Tensor:
        """(B, F, heads * head dim)."""
        query, key, value, residual = self.input(fields_BFX).chunk(4, dim=2)
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        # Spelled out: torch's fused attention takes 1.5 (fp32) to 5 times (bf16) as long on CPU
        # for so few and small vectors.
        shares_BHFF = torch.matmul(query, key.transpose(2, 3)).softmax(dim=3)
        attended_BHFX = torch.matmul(shares_BHFF.to(value.dtype), value)
        return (attended_BHFX.transpose(1, 2).flatten(2) + residual).relu()

"""Classifiers that read all columns alike: MLPs, cross layers, masks and gates."""

# Shapes: B samples, F fields, D embedding dim, H heads, X any width.

import torch
from torch import Tensor, nn

from ranking.classifier_config import DcnV2, DeepFm, Dnn, FinalMlp, MaskNet, WideDeep
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.interactions import CrossNetwork, fm_second_order
from ranking.mlp import in_float32, mlp


class DnnClassifier(nn.Module):
    """An MLP on everything."""

    def __init__(self, config: Dnn, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        return self.mlp(inputs.flat())


class WideDeepClassifier(nn.Module):
    """Wide & Deep (arXiv 1606.07792): a first-order term beside an MLP on everything."""

    def __init__(self, config: WideDeep, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = config.hidden[-1] + 1
        self.first_order = nn.Linear(dims.flat(), 1)
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): hidden units, first order."""
        flat_BX = inputs.flat()
        return torch.cat([self.mlp(flat_BX), in_float32(self.first_order, flat_BX)], dim=1)


class DeepFmClassifier(nn.Module):
    """DeepFM (arXiv 1703.04247): first and second order terms beside an MLP on everything."""

    def __init__(self, config: DeepFm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("deepfm")
        self.output_dim = config.hidden[-1] + 2
        self.first_order = nn.Linear(dims.flat(), 1)
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): hidden units, first order, second order."""
        flat_BX = inputs.flat()
        second_B1 = fm_second_order(inputs.stacked(self.dim))
        first_B1 = in_float32(self.first_order, flat_BX)
        return torch.cat([self.mlp(flat_BX), first_B1, second_B1], dim=1)


class DcnV2Classifier(nn.Module):
    """DCN-v2 (arXiv 2008.13535), parallel form: cross layers beside an MLP, concatenated."""

    def __init__(self, config: DcnV2, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = dims.flat() + config.hidden[-1]
        self.cross = CrossNetwork(dims.flat(), config.num_cross_layers, config.rank)
        self.mlp = mlp(dims.flat(), config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        flat_BX = inputs.flat()
        return torch.cat([self.cross(flat_BX), self.mlp(flat_BX)], dim=1)


class MaskNetClassifier(nn.Module):
    """MaskNet (arXiv 2102.07619), parallel or serial mask blocks.

    Every field's vector is normalised by itself; dense features and interests stand beside them.
    """

    def __init__(self, config: MaskNet, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("masknet")
        self.is_serial = config.form == "serial"
        self.scale_FD = nn.Parameter(torch.ones(dims.num_fields, self.dim))
        self.shift_FD = nn.Parameter(torch.zeros(dims.num_fields, self.dim))
        later = config.block_dim if self.is_serial else dims.flat()
        widths = (dims.flat(), *[later] * (config.num_blocks - 1))
        self.masks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dims.flat(), config.reduction * width),
                nn.ReLU(),
                nn.Linear(config.reduction * width, width),
            )
            for width in widths
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, config.block_dim), nn.LayerNorm(config.block_dim), nn.ReLU()
            )
            for width in widths
        )
        self.output_dim = config.block_dim if self.is_serial else config.hidden[-1]
        joined = config.num_blocks * config.block_dim
        self.mlp = None if self.is_serial else mlp(joined, config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        fields_BFD = nn.functional.layer_norm(inputs.stacked(self.dim), (self.dim,))
        fields_BX = torch.addcmul(self.shift_FD, fields_BFD, self.scale_FD).flatten(1)
        normed = ClassifierInputs(
            fields_BX.to(inputs.fields_BX.dtype), inputs.dense_BX, inputs.interests_BX
        )
        flat_BX, hidden_BX = inputs.flat(), normed.flat()
        outputs = []
        for mask, block in zip(self.masks, self.blocks, strict=True):
            outputs.append(block(mask(flat_BX) * hidden_BX))
            if self.is_serial:
                hidden_BX = outputs[-1]
        return outputs[-1] if self.mlp is None else self.mlp(torch.cat(outputs, dim=1))


class FinalMlpClassifier(nn.Module):
    """FinalMLP (arXiv 2304.00902): two gated MLPs and their bilinear fusion.

    The gates read a learned vector, as in the paper when no context fields are chosen. The heads
    weigh both MLPs' outputs and one bilinear term a head, which together is the paper's fusion.
    """

    def __init__(self, config: FinalMlp, dims: InputDims) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.context_2X = nn.Parameter(torch.randn(2, config.gate_hidden))
        self.gates = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.gate_hidden, config.gate_hidden),
                nn.ReLU(),
                nn.Linear(config.gate_hidden, dims.flat()),
                nn.Sigmoid(),
            )
            for _ in range(2)
        )
        self.first = mlp(dims.flat(), config.first_hidden, config.dropout)
        self.second = mlp(dims.flat(), config.second_hidden, config.dropout)
        first, second = config.first_hidden[-1], config.second_hidden[-1]
        per_head = (self.num_heads, first // self.num_heads, second // self.num_heads)
        self.fusion_HXX = nn.Parameter(nn.init.xavier_normal_(torch.empty(per_head)))
        self.output_dim = first + second + self.num_heads

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        flat_BX = inputs.flat()
        gates = [2 * gate(self.context_2X[i]) for i, gate in enumerate(self.gates)]
        first_BX = self.first(flat_BX * gates[0])
        second_BX = self.second(flat_BX * gates[1])
        first_HBX = first_BX.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        second_HBX = second_BX.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        fused_HBX = torch.bmm(first_HBX, self.fusion_HXX) * second_HBX
        fused_HB = fused_HBX.sum(dim=2, dtype=torch.float32)
        return torch.cat([first_BX, second_BX, fused_HB.t()], dim=1)

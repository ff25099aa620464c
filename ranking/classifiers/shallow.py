"""Classifiers without an MLP: logistic regression and factorisation machines."""

# Shapes: B samples, F fields, D embedding dim, K width of a field-aware vector, X any width.

import math

import torch
from torch import Tensor, nn

from ranking.classifier_config import Ffm, Fm, LogisticRegression
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.interactions import fm_second_order
from ranking.mlp import in_float32


class LogisticRegressionClassifier(nn.Module):
    """Logistic regression: the heads read every column themselves."""

    def __init__(self, config: LogisticRegression, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = dims.flat()

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        return inputs.flat()


class FmClassifier(nn.Module):
    """Factorisation machine (doi 10.1109/ICDM.2010.127)."""

    def __init__(self, config: Fm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("fm")
        self.output_dim = 2
        self.first_order = nn.Linear(dims.flat(), 1)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, 2): first order, second order."""
        second_B1 = fm_second_order(inputs.stacked(self.dim))
        return torch.cat([in_float32(self.first_order, inputs.flat()), second_B1], dim=1)


class FfmClassifier(nn.Module):
    """Field-aware factorisation machine (doi 10.1145/2959100.2959134) on one embedding a field.

    Field a shows field b the vector v_ab = P_ab e_a of width K, so tables need no column a pair:
    with D = F * K columns that is the paper's model, with fewer one of low rank. The second-order
    term, the sum of <v_ab, v_ba> over a < b, is a form e^T M e with blocks M_ab = P_ab^T P_ba.
    So it costs one product with an (F D, F D) matrix instead of F * F vectors a sample.
    """

    upper_FF: Tensor

    def __init__(self, config: Ffm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("ffm")
        self.output_dim = 2
        num_fields, bound = dims.num_fields, 1 / math.sqrt(self.dim)
        start = torch.empty(num_fields, num_fields, config.dim, self.dim)
        self.projection_FFKD = nn.Parameter(start.uniform_(-bound, bound))
        self.first_order = nn.Linear(dims.flat(), 1)
        upper_FF = torch.ones(num_fields, num_fields).triu(diagonal=1)
        self.register_buffer("upper_FF", upper_FF, persistent=False)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, 2): first order, second order."""
        projection = self.projection_FFKD
        blocks_FDFD = torch.einsum("abkd,bake,ab->adbe", projection, projection, self.upper_FF)
        form_XX = blocks_FDFD.flatten(2).flatten(0, 1)
        fields_BX = inputs.fields_BX
        products_BX = torch.mm(fields_BX, form_XX) * fields_BX
        second_B1 = products_BX.sum(dim=1, keepdim=True, dtype=torch.float32)
        return torch.cat([in_float32(self.first_order, inputs.flat()), second_B1], dim=1)

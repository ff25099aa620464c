"""Classifiers: from fields, dense features and interests to one representation of the sample."""

# Shapes: B samples, F fields (sparse features), D embedding dim, X any width.

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedding.errors import UserError
from ranking.config import Classifier, DcnV2, DeepFm, Dnn
from ranking.interactions import CrossNetwork, fm_second_order
from ranking.mlp import mlp


@dataclass(frozen=True)
class InputDims:
    """Widths of what a classifier reads."""

    fields: tuple[tuple[str, int], ...]
    """(name, dim) of every field."""
    num_dense: int
    interest: int
    """Width of all interest vectors together."""

    @property
    def flat(self) -> int:
        """Width of `ClassifierInputs.flat`."""
        return sum(dim for _, dim in self.fields) + self.num_dense + self.interest

    def common_field_dim(self, needed_by: str) -> int:
        """The one dim of all fields.

        Raises:
            UserError: the fields' dims differ.
        """
        dims = {dim for _, dim in self.fields}
        if len(dims) != 1:
            raise UserError(
                f"{needed_by} multiplies embeddings with each other, but the fields have dims "
                f"{dict(self.fields)}; give their tables one embedding_dim or choose the "
                "classifier dnn or dcn_v2"
            )
        return dims.pop()


@dataclass(frozen=True)
class ClassifierInputs:
    """What a classifier reads of one batch."""

    fields_BX: Tensor
    """The vectors of all fields, side by side."""
    dense_BX: Tensor
    interests_BX: Tensor

    def flat(self) -> Tensor:
        """Everything side by side, (B, `InputDims.flat`)."""
        parts = [self.fields_BX, self.dense_BX, self.interests_BX]
        return torch.cat([part for part in parts if part.shape[1]], dim=1)

    def stacked(self, dim: int) -> Tensor:
        """The fields as (B, F, D), a view; all have the dim `dim`."""
        return self.fields_BX.view(self.fields_BX.shape[0], -1, dim)


class DnnClassifier(nn.Module):
    """An MLP on everything."""

    def __init__(self, config: Dnn, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = config.hidden[-1]
        self.mlp = mlp(dims.flat, config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        return self.mlp(inputs.flat())


class DeepFmClassifier(nn.Module):
    """DeepFM (arXiv 1703.04247): first and second order terms beside an MLP on everything.

    The first-order weight of an id is a linear map of its embedding, so it needs no second table.
    """

    def __init__(self, config: DeepFm, dims: InputDims) -> None:
        super().__init__()
        self.dim = dims.common_field_dim("deepfm")
        self.output_dim = config.hidden[-1] + 2
        self.first_order = nn.Linear(dims.flat, 1)
        self.mlp = mlp(dims.flat, config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim): hidden units, first order, second order."""
        flat_BX = inputs.flat()
        second_B1 = fm_second_order(inputs.stacked(self.dim))
        return torch.cat([self.mlp(flat_BX), self.first_order(flat_BX), second_B1], dim=1)


class DcnV2Classifier(nn.Module):
    """DCN-v2 (arXiv 2008.13535), parallel form: cross layers beside an MLP, concatenated."""

    def __init__(self, config: DcnV2, dims: InputDims) -> None:
        super().__init__()
        self.output_dim = dims.flat + config.hidden[-1]
        self.cross = CrossNetwork(dims.flat, config.num_cross_layers, config.rank)
        self.mlp = mlp(dims.flat, config.hidden, config.dropout)

    def forward(self, inputs: ClassifierInputs) -> Tensor:
        """The representation, (B, output_dim)."""
        flat_BX = inputs.flat()
        return torch.cat([self.cross(flat_BX), self.mlp(flat_BX)], dim=1)


AnyClassifier = DnnClassifier | DeepFmClassifier | DcnV2Classifier


def build_classifier(config: Classifier, dims: InputDims) -> AnyClassifier:
    """The classifier a configuration describes.

    Raises:
        UserError: the fields' dims do not suit it.
    """
    match config:
        case Dnn():
            return DnnClassifier(config, dims)
        case DeepFm():
            return DeepFmClassifier(config, dims)
        case DcnV2():
            return DcnV2Classifier(config, dims)

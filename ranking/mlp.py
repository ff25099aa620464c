"""The feed-forward stack that classifiers, experts and towers share, and what ends in a logit."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(in_dim: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU and dropout (where it is not 0) for every width in `hidden`."""
    layers: list[nn.Module] = []
    for out_dim in hidden:
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_dim = out_dim
    return nn.Sequential(*layers)


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float32, also under autocast.

    For whatever adds to logits: bf16 keeps 8 bits, and would give thousands of rows some hundred
    different scores. Such layers are narrow, so this costs next to nothing.
    """
    with torch.autocast(x.device.type, enabled=False):
        exact: Tensor = layer(x.float())
    return exact

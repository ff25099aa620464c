"""The feed-forward stack that classifiers, experts and towers share."""

from collections.abc import Sequence

from torch import nn


def mlp(in_dim: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU and dropout (where it is not 0) for every width in `hidden`."""
    layers: list[nn.Module] = []
    for out_dim in hidden:
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_dim = out_dim
    return nn.Sequential(*layers)

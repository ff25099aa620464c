"""The last layer of the content encoder, on every rank: fused vectors -> content vectors.

Towers and fusion cost too much to encode all items of a step, so most of them are read from the
bank. The last layer is one small product. So the bank holds what it reads, and it is applied to
every item that a step reads, encoded or not: with its weights of now, and it learns from all.
"""

# Shapes: U items, H width of the fused vectors, D content dim.

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from multimodal.content_config import ContentConfig
from multimodal.rank_group import RankGroup
from multimodal.standardised import StandardisedLinear
from multimodal.trained_parameters import TrainedParameters

_ITEMS_AT_A_TIME = 65_536
_LAYER = "output."
_ENCODER = "encoder/"
"""In a checkpoint it is a layer of the encoder like the others."""


class ContentHead:
    """A replica of the layer with its optimizer; equal on all ranks."""

    def __init__(
        self,
        start: Mapping[str, Tensor],
        config: ContentConfig,
        ranks: RankGroup,
        device: torch.device,
    ) -> None:
        """`start`: state of a `StandardisedLinear`, equal on all ranks."""
        dim, width = start["weight"].shape
        self.layer = StandardisedLinear(width, dim)
        self.layer.load_state_dict(start)
        self.layer.to(device)
        self._ranks = ranks
        rates = config.optimizer
        self._trained = TrainedParameters(
            {f"{_LAYER}{n}": p for n, p in self.layer.named_parameters()},
            lambda _: rates.head_learning_rate,
            rates,
            device,
        )

    @property
    def width(self) -> int:
        """H."""
        return self.layer.in_features

    def vectors(self, fused_UH: Tensor) -> Tensor:
        """(U, D), with gradient where it is enabled."""
        vectors_UD: Tensor = self.layer(fused_UH)
        return vectors_UD

    def learn(self, vectors_UD: Tensor, gradient_UD: Tensor, rate_factor: float) -> None:
        """Go backward through vectors that this rank made, and step; all ranks call it.

        The ranks' gradients are averaged.
        """
        self._trained.clear_gradient()
        vectors_UD.backward(gradient_UD)
        gradient_P = self._trained.gradient()
        self._ranks.add_up(gradient_P)
        self._trained.update(gradient_P / self._ranks.world_size, rate_factor)

    def gradient_norm(self) -> float:
        """Of the last step."""
        (norm,) = self._trained.gradient_norms(lambda _: _LAYER).values()
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        weights = {f"{_ENCODER}{_LAYER}{name}": t for name, t in self.layer.state_dict().items()}
        return weights | self._trained.optimizer_state()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the checkpoint of an encoder whose other layers fit."""
        self.layer.load_state_dict(_below(f"{_ENCODER}{_LAYER}", tensors))
        self._trained.load_optimizer_state(tensors)

    def warm_start(self, tensors: Mapping[str, Tensor]) -> int:
        """As `load`, but for inputs that were constant when the checkpoint's moments were computed.

        Returns:
            How many of them vary now: they take the moments that the layer started with.
        """
        now = {name: moment.clone() for name, moment in self.layer.named_buffers()}
        self.load(tensors)
        return int(self.layer.wake(**now).sum())


def trained_vectors(encoder: Mapping[str, Tensor], fused: Iterable[Tensor]) -> Tensor:
    """Content vectors (N, D) of a checkpoint, on the CPU.

    Args:
        encoder: its tensors below `encoder/`.
        fused: rows of its bank, as they are read, block by block.
    """
    weights = _below(_LAYER, encoder)
    dim, width = weights["weight"].shape
    layer = StandardisedLinear(width, dim).requires_grad_(False)
    layer.load_state_dict(weights)
    parts = (part for block in fused for part in block.split(_ITEMS_AT_A_TIME))
    return torch.cat([layer(part) for part in parts])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

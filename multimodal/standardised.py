"""Standardised encoder outputs: what contrastive training must start from.

Mean tokens of pretrained towers all point the same way (two items of a catalogue have a cosine
near 1), so a contrastive loss sees no difference between items and collapses. Subtracting each
dimension's mean over the catalogue and dividing by its deviation removes that. Both are of the
items that have the modality, and those that lack it get the mean: 0 once it is standardised.

Shapes: N items, U items of a chunk, H width of the fused tokens, D vector dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from multimodal.content_encoder import ContentEncoder, load_trained_state, trained_state
from multimodal.fusion import ConcatOfModalities
from multimodal.token_batch import TokenBatch

_MIN_DEVIATION = 1e-6


class StandardisedLinear(nn.Linear):
    """A linear layer on inputs of mean 0 and deviation 1 over the catalogue."""

    mean_H: Tensor
    deviation_H: Tensor

    def __init__(self, linear: nn.Linear, mean_H: Tensor, deviation_H: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.register_buffer("mean_H", mean_H)
        # A constant dimension says nothing: it stays 0 instead of being blown up.
        self.register_buffer(
            "deviation_H", torch.where(deviation_H > _MIN_DEVIATION, deviation_H, torch.inf)
        )

    def standardised(self, x_UH: Tensor) -> Tensor:
        """The inputs with mean 0 and deviation 1 over the catalogue."""
        return (x_UH - self.mean_H) / self.deviation_H

    def forward(self, x_UH: Tensor) -> Tensor:
        """(U, D)."""
        return super().forward(self.standardised(x_UH))


@torch.no_grad()
def standardise(
    encoder: ContentEncoder, read: Callable[[Tensor], TokenBatch], rows_N: Tensor, size: int
) -> None:
    """Give an encoder's last layer standardised inputs, in place.

    Args:
        encoder: as initialised.
        read: tokens of items by row.
        rows_N: items to take mean and deviation over.
        size: items of a chunk.
    """
    count, total, squares = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for chunk in rows_N.split(size):
        batch = read(chunk)
        present_UH = _columns_present(encoder, batch)
        fused_UH = encoder.fused(batch).double() * present_UH
        count = count + present_UH.sum(0)
        total = total + fused_UH.sum(0)
        squares = squares + fused_UH.square().sum(0)
    mean_H = total / count.clamp(min=1)
    deviation_H = (squares / count.clamp(min=1) - mean_H.square()).clamp(min=0).sqrt()
    _install(encoder, mean_H.float(), deviation_H.float())


def state_of(encoder: ContentEncoder) -> dict[str, Tensor]:
    """Everything that makes this encoder differ from a freshly loaded one."""
    assert isinstance(encoder.output, StandardisedLinear)
    buffers = {f"output.{name}": buffer for name, buffer in encoder.output.named_buffers()}
    return {**trained_state(encoder), **buffers}


def load_state(encoder: ContentEncoder, state: dict[str, Tensor]) -> None:
    """Bring a freshly loaded encoder to a `state_of`, in place.

    Raises:
        UserError: it is another encoder's.
    """
    _install(encoder, state["output.mean_H"], state["output.deviation_H"])
    load_trained_state(
        encoder, {n: v for n, v in state.items() if not n.startswith(("output.mean", "output.dev"))}
    )


def _columns_present(encoder: ContentEncoder, batch: TokenBatch) -> Tensor:
    """(U, H), or (U, 1) for all columns: False where nothing of the item is read."""
    if isinstance(encoder.fusion, ConcatOfModalities):
        return encoder.fusion.columns_present(batch.modalities)
    parts = [part.present for part in batch.modalities.values()]
    return torch.stack(parts).any(dim=0).unsqueeze(1)


def _install(encoder: ContentEncoder, mean_H: Tensor, deviation_H: Tensor) -> None:
    encoder.output = StandardisedLinear(encoder.output, mean_H, deviation_H)
    if isinstance(encoder.fusion, ConcatOfModalities):
        encoder.fusion.replace_absent(mean_H)

"""Predictions of a model, batch by batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedding.batch import RankingBatch
from ranking.tasks import probabilities

# Shapes: R real rows of a batch, T tasks, K keys.


@dataclass(frozen=True)
class Predictions:
    """Predictions for the real rows of one batch, on the CPU; may hold no row."""

    keys_RK: Tensor
    """int64, in the order of `embedding.samples.KEYS`."""
    labels_RT: Tensor
    """0 where the label is missing: look at the weights."""
    weights_RT: Tensor
    """0 where the label is missing."""
    probs_RT: Tensor
    """float64: float32 has no number between 1 - 6e-8 and 1, where a logloss still differs."""


def predict(
    step: nn.Module, batches: Iterable[RankingBatch], device: torch.device
) -> Iterator[Predictions]:
    """Probabilities of every batch. With sharded tables all ranks must iterate to the end.

    Args:
        step: a `RankingStep`, sharded or not; left in evaluation mode.
        batches: equally many on every rank, as `embedding.loader.BatchStream` gives them.
        device: of the model.
    """
    step.eval()
    for batch in batches:
        with torch.no_grad():
            _, (logits_BT, labels_BT, weights_BT, _) = step(batch.to(device))
        probs_BT = probabilities(logits_BT.double()).cpu()
        real = batch.num_rows
        yield Predictions(
            keys_RK=batch.keys_BK[:real].cpu(),
            labels_RT=labels_BT[:real].cpu(),
            weights_RT=weights_BT[:real].cpu(),
            probs_RT=probs_BT[:real],
        )

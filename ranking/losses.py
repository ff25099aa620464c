"""The training loss: weighted binary cross-entropy over tasks, missing labels left out."""

# Shapes: B samples, T tasks.

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TaskLoss(nn.Module):
    """Sum over tasks and rows of task weight * label weight * BCE, divided by the batch size B.

    B counts every row, also those whose label is missing and those that only fill up the batch. So
    each row of the data counts the same in whatever batch it lands, and the mean of this loss over
    ranks with b rows each, which is what DDP's gradient averaging computes, is the loss of one
    rank with all the rows.
    """

    task_weights_T: Tensor

    def __init__(self, task_weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("task_weights_T", torch.tensor(task_weights), persistent=False)

    def forward(self, logits_BT: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> Tensor:
        """The loss, a float32 scalar."""
        losses_BT = nn.functional.binary_cross_entropy_with_logits(
            logits_BT.float(), labels_BT, weights_BT * self.task_weights_T, reduction="none"
        )
        return losses_BT.sum() / logits_BT.shape[0]

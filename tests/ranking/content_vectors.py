"""A content source for tests of the ranker: vectors in memory, without any encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor

from embedding.batch import RankingBatch
from embedding.items import ContentVectors, ItemRows

DIM = 6
STORE = torch.arange(0, 1000, 2)
"""Raw ids of the items with content: every other one."""


class StoredVectors:
    """A source that learns its vectors by plain SGD, and writes down what it was asked."""

    def __init__(self) -> None:
        self.vectors = torch.randn(len(STORE), DIM, generator=torch.Generator().manual_seed(0))
        self.calls: list[str] = []
        self.last: ContentVectors | None = None

    def ahead(self, batches: Iterator[RankingBatch]) -> Iterator[RankingBatch]:
        self.calls.append("ahead")
        return batches

    def train(self, items: ItemRows) -> ContentVectors:
        self.calls.append("train")
        self.last = ContentVectors(self._vectors(items).requires_grad_(), items)
        return self.last

    def learn(self, rate_factor: float) -> None:
        self.calls.append("learn")
        assert self.last is not None
        gradient_UD = self.last.vectors_UD.grad
        assert gradient_UD is not None
        self.vectors[self.last.items.rows_U[1:]] -= 0.5 * rate_factor * gradient_UD[1:]

    def refresh(self) -> None:
        self.calls.append("refresh")

    def read(self, items: ItemRows) -> ContentVectors:
        self.calls.append("read")
        return ContentVectors(self._vectors(items), items)

    def metrics(self) -> dict[str, float]:
        return {"content/figure": 1.0}

    def _vectors(self, items: ItemRows) -> Tensor:
        vectors_UD = self.vectors[items.rows_U].clone()
        vectors_UD[0] = 0
        return vectors_UD


class Likeness(torch.nn.Module):
    """Sum over candidates of <content, id> times their store row."""

    def forward(self, content_BD: Tensor, ids_BX: Tensor, rows_B: Tensor) -> Tensor:
        return (content_BD * ids_BX[:, :DIM] * rows_B.unsqueeze(1)).sum()

    def forget(self) -> None:
        """It holds nothing."""

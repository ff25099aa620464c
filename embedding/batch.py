"""The one typed batch that goes through the program."""

# Shapes: B samples, T tasks, F dense features, K keys.

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from embedding.items import ItemRows


@dataclass(frozen=True)
class RankingBatch(Pipelineable):
    """One mini-batch on one device.

    `pooled` holds `FeatureSchema.pooled_features`; `unpooled` holds `unpooled_features` and then
    `sequences`. Values are rows of the tables, except under managed collision: raw ids there.
    """

    dense_BF: Tensor
    """float32."""
    pooled: KeyedJaggedTensor
    unpooled: KeyedJaggedTensor
    labels_BT: Tensor
    """float32; NaN where the label is missing."""
    weights_BT: Tensor
    """float32; of the row, whether its label is there or not, and 0 where it only fills up."""
    keys_BK: Tensor
    """int64, in the order of `embedding.samples.KEYS`; a filling row repeats a real one."""
    num_rows: int
    """Real rows; the `B - num_rows` last ones only fill up the batch."""
    content: ItemRows | None = None
    """The items whose content the model reads; None where it reads none."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "RankingBatch":
        """The batch on `device`."""
        return RankingBatch(
            *(part.to(device=device, non_blocking=non_blocking) for part in self._parts()),
            num_rows=self.num_rows,
            content=None if self.content is None else self.content.to(device, non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until `stream` has used it."""
        for part in self._parts():
            part.record_stream(stream)
        if self.content is not None:
            self.content.record_stream(stream)

    def pin_memory(self) -> "RankingBatch":
        """The batch in page-locked host memory."""
        return RankingBatch(
            *(part.pin_memory() for part in self._parts()),
            num_rows=self.num_rows,
            content=None if self.content is None else self.content.pin_memory(),
        )

    def _parts(
        self,
    ) -> tuple[Tensor, KeyedJaggedTensor, KeyedJaggedTensor, Tensor, Tensor, Tensor]:
        return (
            self.dense_BF,
            self.pooled,
            self.unpooled,
            self.labels_BT,
            self.weights_BT,
            self.keys_BK,
        )

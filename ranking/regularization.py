"""L2 on the embeddings a batch looks up, as part of the loss."""

# Shapes: B samples, N events of all histories, D width.

import torch
from torch import Tensor, nn

from embedding.batch import RankingBatch
from embedding.feature_schema import FeatureSchema
from embedding.tables import EmbeddedBatch


class LookupPenalty(nn.Module):
    """l2 / 2 times the squares of all vectors looked up for a sample, averaged over the batch.

    Its gradient is l2 * vector for every look-up, and flows into the tables as the loss's own does:
    so it works with every fused optimizer, on CPU and GPU, and an id is held back as often as it
    occurs. Of a pooled list the sum, or mean, is one vector; of an event what the classifier reads,
    not the columns that the same row holds for a generator. Holds no table: a leaf for tracing.
    """

    def __init__(self, schema: FeatureSchema, l2: float) -> None:
        """`schema` is not widened (see `ranking.compatibility.table_widths`)."""
        super().__init__()
        self.l2 = l2
        self._history_of = {s.name: s.history for s in schema.sequences}
        self._dims = {s.name: schema.table(s.table).embedding_dim for s in schema.sequences}

    def forward(self, embedded: EmbeddedBatch, batch: RankingBatch) -> Tensor:
        """A float32 scalar; rows that only fill up the batch count as 0."""
        num_slots = embedded.fields_BD.shape[0]
        total = embedded.fields_BD[: batch.num_rows].float().square().sum()
        for name, history in self._history_of.items():
            vectors_ND = embedded.sequences[name][:, : self._dims[name]]
            squares_N = vectors_ND.float().square().sum(dim=1)
            if batch.num_rows < num_slots:
                is_real_B = torch.arange(num_slots, device=squares_N.device) < batch.num_rows
                is_real_N = torch.repeat_interleave(
                    is_real_B, embedded.lengths[history], output_size=len(squares_N)
                )
                squares_N = squares_N * is_real_N
            total = total + squares_N.sum()
        return self.l2 / 2 * total / num_slots

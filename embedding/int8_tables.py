"""Embedding tables of one byte an element, looked up on the CPU.

Rows stay as they are stored (`embedding.int8_rows`): the kernel sums what it reads, and no fp32
copy of a table exists.
"""

# Shapes: W bytes of a row, B samples, F features, N jagged values, D embedding dim.

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embedding.batch import RankingBatch
from embedding.feature_schema import FeatureSchema
from embedding.tables import EmbeddedBatch, FieldAssembly


class Int8Tables:
    """Gives what `EmbeddingTables` gives, from tables of 8 bits, and trains nothing.

    TorchRec's quantized collections keep scale and bias in fp16, which rounds a bias near 1.0 by up
    to 0.0005: more than half the scale of a row whose range is 0.1. So torch's kernel, which reads
    them in fp32, is called instead.
    """

    def __init__(self, rows: Mapping[str, Tensor], schema: FeatureSchema) -> None:
        """Tables by name.

        Args:
            rows: of each table, (R, W).
            schema: what reads them; with the tables' true widths.
        """
        self.rows = rows
        self._table = {feature.name: feature.table for feature in schema.id_features}
        self._assembly = FieldAssembly(schema)

    def __call__(self, batch: RankingBatch) -> EmbeddedBatch:
        """Look up every feature of the batch."""
        pooled = [self._pooled(batch.pooled)] if batch.pooled.keys() else []
        embedded: EmbeddedBatch = self._assembly(pooled, [self._unpooled(batch.unpooled)], batch)
        return embedded

    def _pooled(self, features: KeyedJaggedTensor) -> KeyedTensor:
        keys, starts = features.keys(), features.offset_per_key()
        offsets_F = features.offsets()
        num_bags = (offsets_F.numel() - 1) // len(keys)
        parts = []
        for index, name in enumerate(keys):
            values_N = features.values()[starts[index] : starts[index + 1]]
            bounds = offsets_F[index * num_bags : (index + 1) * num_bags + 1] - starts[index]
            parts.append(_sums(self.rows[self._table[name]], values_N, bounds))
        widths = [part.shape[1] for part in parts]
        return KeyedTensor(keys=keys, length_per_key=widths, values=torch.cat(parts, dim=1))

    def _unpooled(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        keys = features.keys()
        if not keys:
            return {}
        starts, lengths_FB = features.offset_per_key(), features.lengths().view(len(keys), -1)
        found = {}
        for index, name in enumerate(keys):
            values_N = features.values()[starts[index] : starts[index + 1]]
            # Bags of one id: faster than gathering bytes and making floats of them afterwards.
            bounds = torch.arange(len(values_N) + 1)
            vectors_ND = _sums(self.rows[self._table[name]], values_N, bounds)
            found[name] = JaggedTensor(values=vectors_ND, lengths=lengths_FB[index])
        return found


def _sums(rows_RW: Tensor, ids_N: Tensor, bounds: Tensor) -> Tensor:
    """Sums (bags, D) of the rows of every bag of ids; zeros where it is empty.

    Raises:
        RuntimeError: there is no such row.
    """
    sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        rows_RW, ids_N, bounds.to(ids_N.dtype), include_last_offset=True
    )
    return sums

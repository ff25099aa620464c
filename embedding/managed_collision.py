"""Managed collision (zero-collision hashing): every frequent id owns a row, the rest are evicted.

An id is mixed into [0, 2**62) by `hashing`; its owner rank is the 2**62 / world_size wide bucket it
falls in, and only that rank's rows can be its row. The last row of every rank's shard is the
unknown row: ids without a row of their own share it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.mc_embedding_modules import (
    BaseShardedManagedCollisionEmbeddingCollection,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from embedding.config import ManagedCollision
from embedding.feature_schema import FeatureSchema
from embedding.hashing import MANAGED_ID_RANGE

_HISTORY_SLACK = 1.25
"""Of the memory of ids over what batches like the present one need; TorchRec's own."""


class CollisionModule(MCHManagedCollisionModule):
    """TorchRec's, whose memory of ids between evictions grows instead of dropping some silently.

    TorchRec sizes it by the first batch, which may be smaller than later ones; restored, it is just
    large enough for the ids that were saved.
    """

    _input_history_buffer_size: int
    _history_accumulator: Tensor

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Called by TorchRec with the ids of a batch that this rank owns."""
        if self.training:
            self._make_room(sum(feature.values().numel() for feature in features.values()))
        return super().profile(features)

    def _make_room(self, num_ids: int) -> None:
        used = self._current_history_buffer_offset
        if not 0 <= self._input_history_buffer_size < used + num_ids:
            return
        needed = max(used + num_ids, num_ids * self._eviction_interval)
        self._input_history_buffer_size = size = int(needed * _HISTORY_SLACK)
        self._history_accumulator = _grown(self._history_accumulator[:used], size)
        for name, values in self._history_metadata.items():
            buffer = _grown(values[:used], size)
            self.register_buffer(f"_history_{name}", buffer, persistent=False)
            self._history_metadata[name] = buffer


def _grown(values: Tensor, size: int) -> Tensor:
    buffer = values.new_empty(size)
    buffer[: values.numel()] = values
    return buffer


def collision_collection(
    schema: FeatureSchema, configs: Sequence[BaseEmbeddingConfig], device: torch.device
) -> ManagedCollisionCollection:
    """The collision modules of these tables, with the eviction each table asks for."""
    modules = {}
    for config in configs:
        scheme = schema.table(config.name).ids
        assert isinstance(scheme, ManagedCollision)
        modules[config.name] = CollisionModule(
            zch_size=config.num_embeddings,
            device=device,
            eviction_policy=_eviction_policy(scheme),
            eviction_interval=scheme.eviction_interval_steps,
            input_hash_size=MANAGED_ID_RANGE,
        )
    return ManagedCollisionCollection(
        managed_collision_modules=modules, embedding_configs=configs, need_preprocess=False
    )


def reinitialize_rows(bound: float) -> Callable[[Tensor], Tensor]:
    """What TorchRec applies to the rows of evicted ids."""

    def draw(rows: Tensor) -> Tensor:
        return torch.nn.init.uniform_(rows, -bound, bound)

    return draw


def _eviction_policy(scheme: ManagedCollision) -> MCHEvictionPolicy:
    match scheme.eviction:
        case "lfu":
            return LFU_EvictionPolicy()
        case "lru":
            return LRU_EvictionPolicy()
        case "distance_lfu":
            return DistanceLFU_EvictionPolicy()


def set_num_buckets(model: nn.Module, num_buckets: int) -> None:
    """One id bucket per rank: the planner requires a multiple of the world size."""
    for module in model.modules():
        if isinstance(module, MCHManagedCollisionModule):
            module._buckets = num_buckets


class EvictionReset:
    """Stands in for a TBE when TorchRec resets evicted rows: resets every optimizer state.

    The kernel behind `reset_embedding_weight_momentum` exists for CUDA only and resets row-wise
    accumulators only; a new id would inherit the Adagrad or Adam state of the evicted one.
    """

    def __init__(self, tbe: Any, table_index: int) -> None:
        self._tbe = tbe
        self._table_index = table_index

    def reset_embedding_weight_momentum(
        self, *, pruned_indices: Tensor, **table_selection: Tensor
    ) -> None:
        """Called by TorchRec with the local rows of evicted ids."""
        if pruned_indices.is_cuda:
            # Also drops the rows from the cache of a table in host memory.
            self._tbe.reset_embedding_weight_momentum(
                pruned_indices=pruned_indices, **table_selection
            )
        states = self._tbe.split_optimizer_states()  # empty for SGD
        reset_states(states[self._table_index] if states else [], pruned_indices)


def reset_states(states: Sequence[Tensor], rows: Tensor) -> None:
    """Zero `rows` of every optimizer state, row-wise (R,) or element-wise (R, D), in place."""
    for state in states:
        state.index_fill_(0, rows, 0.0)


def reset_optimizer_of_evicted_rows(model: nn.Module) -> None:
    """Give every sharded managed-collision module an `EvictionReset` per table."""
    for module in model.modules():
        if isinstance(module, BaseShardedManagedCollisionEmbeddingCollection):
            module._table_to_tbe_and_index = {
                table: (EvictionReset(tbe, int(index)), index)
                for table, (tbe, index) in module._table_to_tbe_and_index.items()
            }

"""Managed collision (zero-collision hashing): every frequent id owns a row, the rest are evicted.

An id is mixed into [0, 2**62) by `hashing`; its owner rank is the 2**62 / world_size wide bucket it
falls in, and only that rank's rows can be its row. The last row of every rank's shard is the
unknown row: ids without a row of their own share it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)

from embedding.config import FeatureSchema, ManagedCollision
from embedding.hashing import MANAGED_ID_RANGE


def collision_collection(
    schema: FeatureSchema, configs: Sequence[BaseEmbeddingConfig], device: torch.device
) -> ManagedCollisionCollection:
    """The collision modules of these tables, with the eviction each table asks for."""
    modules = {}
    for config in configs:
        scheme = schema.table(config.name).ids
        assert isinstance(scheme, ManagedCollision)
        modules[config.name] = MCHManagedCollisionModule(
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

"""TorchRec's sharders, allowed to do on gloo what they are able to do there."""

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs, ShardingType

from embedding.config import ShardingConfig

_UVM_KERNELS = [
    EmbeddingComputeKernel.FUSED_UVM.value,
    EmbeddingComputeKernel.FUSED_UVM_CACHING.value,
]


def make_sharders(config: ShardingConfig, device_type: str) -> list[ModuleSharder[nn.Module]]:
    """Sharders for every collection of `EmbeddingTables`, with the configured wire precision."""
    codecs = _codecs(config, device_type)
    return [
        BagSharder(qcomm_codecs_registry=codecs),
        CollectionSharder(qcomm_codecs_registry=codecs),
        ManagedBagSharder(ebc_sharder=BagSharder(qcomm_codecs_registry=codecs)),
        ManagedCollectionSharder(ec_sharder=CollectionSharder(qcomm_codecs_registry=codecs)),
    ]


class BagSharder(EmbeddingBagCollectionSharder):
    """Allows row-wise, table-row-wise and grid sharding on CPU too, where TorchRec only hides them.

    They run there over gloo; `tests/embedding/test_sharded_equals_unsharded.py` shows it.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Every type of the configuration."""
        return [
            ShardingType.DATA_PARALLEL.value,
            ShardingType.TABLE_WISE.value,
            ShardingType.COLUMN_WISE.value,
            ShardingType.TABLE_COLUMN_WISE.value,
            ShardingType.ROW_WISE.value,
            ShardingType.TABLE_ROW_WISE.value,
            ShardingType.GRID_SHARD.value,
        ]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Kernels whose optimizer we can save: fused ones, dense for data-parallel tables."""
        return _kernels(sharding_type, compute_device_type)


class CollectionSharder(EmbeddingCollectionSharder):
    """As TorchRec's, restricted to the kernels we can checkpoint."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """As `BagSharder`."""
        return _kernels(sharding_type, compute_device_type)


class ManagedBagSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    """As TorchRec's, restricted to the kernels we can checkpoint."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """As `BagSharder`."""
        return _kernels(sharding_type, compute_device_type)


class ManagedCollectionSharder(ManagedCollisionEmbeddingCollectionSharder):
    """As TorchRec's, restricted to the kernels we can checkpoint."""

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """As `BagSharder`."""
        return _kernels(sharding_type, compute_device_type)


def _kernels(sharding_type: str, compute_device_type: str) -> list[str]:
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return [EmbeddingComputeKernel.DENSE.value]
    uvm = _UVM_KERNELS if compute_device_type == "cuda" else []
    return [EmbeddingComputeKernel.FUSED.value, *uvm]


def _codecs(config: ShardingConfig, device_type: str) -> dict[str, QuantizedCommCodecs] | None:
    if config.communication == "fp32":
        return None
    # A loss divided by the batch size has gradients below the least float16. FBGEMM's loss scale is
    # no remedy: it divides what it received before it widens it. Gloo knows no bf16.
    backward = CommType.BF16 if device_type == "cuda" else CommType.FP32
    forward = CommType[config.communication.upper()]
    return get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=forward, backward_precision=backward),
        device=torch.device(device_type),
    )

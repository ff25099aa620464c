"""The pieces of tables that live on this rank, as plain tensors with their place in the table.

TorchRec knows them as shards of lookups, different for every sharding type; initialisation and
checkpoints only need to know which rows and columns a tensor holds.
"""

# Shapes: R rows and D columns of a shard.

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingType

from embedding.config import SparseOptimizer, TableConfig
from embedding.feature_schema import FeatureSchema
from embedding.row_optimizer import STATE_NAMES

ShardedCollection: TypeAlias = ShardedEmbeddingBagCollection | ShardedEmbeddingCollection  # noqa: UP040


@dataclass(frozen=True)
class TableShard:
    """A rectangle of one table on this rank; the tensors are views into what training updates."""

    table: TableConfig
    row_offset: int
    column_offset: int
    weight_RD: Tensor
    states: dict[str, Tensor]
    """Optimizer states: (R, D), or (R,) for a row-wise accumulator."""
    replicated: bool
    """Data-parallel: every rank holds the whole table."""
    tbe: nn.Module | None
    """The fused kernel; None for data-parallel tables."""
    step_counter: Tensor
    """Optimizer steps so far; shared by the tables of one kernel."""

    @property
    def rows(self) -> tuple[int, int]:
        """First row and the row after the last one."""
        return self.row_offset, self.row_offset + self.weight_RD.shape[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First column and the column after the last one."""
        return self.column_offset, self.column_offset + self.weight_RD.shape[1]


def sharded_collections(model: nn.Module) -> Iterator[tuple[str, ShardedCollection]]:
    """Every sharded collection with its path, those inside managed-collision modules included."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedCollection):
            yield path, module


def data_parallel_weights(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Weight of every data-parallel table, by its name in `model.named_parameters()`."""
    names = {
        f"{path}.{_children(module)[0]}.{table}.weight"
        for path, module in sharded_collections(model.module)
        for table, entry in module.module_sharding_plan.items()
        if entry.sharding_type == ShardingType.DATA_PARALLEL.value
    }
    return {name: param for name, param in model.named_parameters() if name in names}


def table_shards(
    model: nn.Module,
    schema: FeatureSchema,
    optimizer: SparseOptimizer,
    row_optimizer: torch.optim.Optimizer | None,
) -> list[TableShard]:
    """All shards of this rank, in a stable order.

    Args:
        model: the sharded model.
        schema: says which table a shard belongs to.
        optimizer: names the states.
        row_optimizer: holds the states of the data-parallel tables; None if there are none.
    """
    shards = []
    for _, collection in sharded_collections(model):
        for lookup in collection._lookups:
            replicated = isinstance(lookup, DistributedDataParallel)
            inner: Any = lookup.module if replicated else lookup
            for kernel in inner._emb_modules:
                if replicated:
                    assert row_optimizer is not None
                    shards += _replicated(collection, kernel, schema, row_optimizer)
                else:
                    shards += _fused(kernel, schema, STATE_NAMES[optimizer.kind])
    order = [table.name for table in schema.tables]
    shards.sort(key=lambda s: (order.index(s.table.name), s.row_offset, s.column_offset))
    return shards


def flush_caches(shards: Iterable[TableShard], *, forget: bool) -> None:
    """Write rows cached in device memory back to tables in host memory.

    `forget` empties the caches instead: for tables that were just overwritten.
    """
    kernels: dict[int, Any] = {id(shard.tbe): shard.tbe for shard in shards if shard.tbe}
    for kernel in kernels.values():
        if forget:
            kernel.reset_cache_states()
        else:
            kernel.flush()


def _fused(kernel: Any, schema: FeatureSchema, states: tuple[str, ...]) -> list[TableShard]:
    tbe = kernel._emb_module
    tables = kernel._config.embedding_tables
    weights = tbe.split_embedding_weights()
    optimizer_states = tbe.split_optimizer_states() or [[] for _ in tables]
    shards = []
    for table, weight, values in zip(tables, weights, optimizer_states, strict=True):
        row_offset, column_offset = table.local_metadata.shard_offsets
        shards.append(
            TableShard(
                table=schema.table(table.name),
                row_offset=row_offset,
                column_offset=column_offset,
                weight_RD=weight.detach(),
                states=dict(zip(states, values, strict=True)),
                replicated=False,
                tbe=tbe,
                step_counter=tbe.iter,
            )
        )
    return shards


def _replicated(
    collection: ShardedCollection,
    kernel: Any,
    schema: FeatureSchema,
    row_optimizer: torch.optim.Optimizer,
) -> list[TableShard]:
    shards = []
    for table in kernel._config.embedding_tables:
        weight = _children(collection)[1].get_parameter(f"{table.name}.weight")
        state = row_optimizer.state[weight]
        shards.append(
            TableShard(
                table=schema.table(table.name),
                row_offset=0,
                column_offset=0,
                weight_RD=weight.data,
                states={name: value for name, value in state.items() if name != "step"},
                replicated=True,
                tbe=None,
                step_counter=state["step"],
            )
        )
    return shards


def _children(collection: ShardedCollection) -> tuple[str, nn.ModuleDict]:
    if isinstance(collection, ShardedEmbeddingBagCollection):
        return "embedding_bags", collection.embedding_bags
    return "embeddings", collection.embeddings

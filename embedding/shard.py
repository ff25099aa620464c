"""The golden order: meta -> optimizer in backward -> plan -> DistributedModelParallel -> dense."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as optimizer_in_backward,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import optimizers as fused
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as FusedRowWiseAdagrad

from embedding.config import (
    Adagrad,
    Adam,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
    SparseOptimizer,
    TableConfig,
)
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.initialization import initialize_shard
from embedding.limits import check_support
from embedding.managed_collision import reset_optimizer_of_evicted_rows
from embedding.placement import (
    TableShard,
    data_parallel_weights,
    flush_caches,
    sharded_collections,
    table_shards,
)
from embedding.planning.plan import plan_of
from embedding.planning.plan_description import PlanDescription
from embedding.planning.prediction import refuse_other_sizes
from embedding.planning.sharders import make_sharders
from embedding.planning.this_machine import ranks_per_host
from embedding.planning.topology import use_hosts_of
from embedding.row_optimizer import RowOptimizer
from embedding.tables import EmbeddingTables
from embedding.unpooled_cpu import mend_unpooled_lookups

_INSIDE_MANAGED = "._embedding_module"
"""Where a managed-collision module, which is what a plan names, keeps its collection."""


class Companion(Protocol):
    """Training state beside the model, equal on all ranks, that shares its checkpoints.

    All ranks make the same calls.
    """

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, on rank 0; the other ranks may give nothing."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on exactly; a scalar comes back as one element."""

    def warm_start(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over what fits from another run; values may be read when they are asked for.

        Returns:
            What does not come from it, by the tensors' names or the first part of them, and why.
        """
        ...


DenseOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Sharded:
    """A sharded model, its optimizers and its plan."""

    model: DistributedModelParallel
    optimizer: KeyedOptimizer
    """Steps everything: dense parameters, data-parallel tables; sharded tables step in backward."""
    plan: PlanDescription
    schema: FeatureSchema
    optimizer_kind: str
    """Kind of the sparse optimizer."""
    shards: list[TableShard]
    """This rank's pieces of the tables."""
    dense_parameters: dict[str, nn.Parameter]
    """Everything that is not a table."""
    dense_optimizer: torch.optim.Optimizer | None
    """The optimizer of `dense_parameters`; None if there are none."""
    companion: Companion | None = None
    """What trains beside the model, if anything does."""

    def initialize(self, seed: int) -> None:
        """Draw the tables' start values: the same for every plan and world size."""
        for shard in self.shards:
            initialize_shard(
                shard.weight_RD,
                shard.table,
                seed=seed,
                row_offset=shard.row_offset,
                column_offset=shard.column_offset,
            )
        flush_caches(self.shards, forget=True)


def shard(
    model: nn.Module,
    *,
    optimizer: SparseOptimizer,
    sharding: ShardingConfig,
    dense_optimizer: DenseOptimizer,
    device: torch.device,
    plan: PlanDescription,
) -> Sharded:
    """Shard `model.tables` (built on meta) over the default process group; build the optimizers.

    Args:
        model: has an attribute `tables`, an `EmbeddingTables` on the meta device.
        optimizer: of the tables; fused into backward, except for data-parallel tables.
        sharding: memory, hosts, precision on the wire.
        dense_optimizer: makes the optimizer of all other parameters.
        device: of this rank.
        plan: for this process group.

    Raises:
        UserError: if something asked for cannot run on `device`, or the plan is of another model.
    """
    tables = cast(EmbeddingTables, model.tables)
    schema = tables.schema
    check_support(schema, optimizer, sharding, device.type)
    # Hierarchical shards must find the hosts that their plan was made for.
    use_hosts_of(plan.ranks_per_host or ranks_per_host(sharding, dist.get_world_size()))
    # Tables first: their optimizer is fused into backward, so it must exist before sharding.
    declare_optimizer(tables, optimizer)
    refuse_other_sizes(plan, schema)
    sharded = DistributedModelParallel(
        model,
        device=device,
        plan=plan_of(plan),
        sharders=make_sharders(sharding, device.type),
    )
    _refuse_other_plan(plan, sharded)
    reset_optimizer_of_evicted_rows(sharded)
    mend_unpooled_lookups(sharded)
    # Data-parallel tables have no fused kernel: without an optimizer of their own they would
    # silently be trained by the dense one.
    replicated = data_parallel_weights(sharded)
    rows = _row_optimizer(replicated, schema, optimizer)
    dense_parameters = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(sharded.named_parameters())
        if name not in replicated
    }
    dense = KeyedOptimizerWrapper(dense_parameters, dense_optimizer) if dense_parameters else None
    shards = table_shards(sharded, schema, optimizer, rows._optimizer if rows else None)
    for kernel in {id(s.tbe): s.tbe for s in shards if s.tbe}.values():
        kernel.register_forward_hook(_take_back_step)
    return Sharded(
        model=sharded,
        optimizer=_combine(sharded.fused_optimizer, rows, dense),
        plan=plan,
        schema=schema,
        optimizer_kind=optimizer.kind,
        shards=shards,
        dense_parameters=dense_parameters,
        dense_optimizer=dense._optimizer if dense else None,
    )


def _take_back_step(kernel: Any, _inputs: object, _output: object) -> None:
    """Fbgemm counts a forward as a step, by which Adam corrects its bias; evaluation is none."""
    if not kernel.training:
        kernel.iter_cpu.sub_(1)
        kernel.iter.sub_(1)


def _refuse_other_plan(plan: PlanDescription, sharded: DistributedModelParallel) -> None:
    """TorchRec leaves tables a plan does not name unsharded, without a word, and untrained."""
    planned = {(entry.module, entry.table) for entry in plan.tables}
    found = {
        (path.removesuffix(_INSIDE_MANAGED), table)
        for path, collection in sharded_collections(sharded.module)
        for table in collection.module_sharding_plan
    }
    if planned != found:
        raise UserError(
            f"the sharding plan does not fit the model: it places {sorted(planned - found)}, which "
            f"the model lacks, and misses {sorted(found - planned)}; plan again for this recipe"
        )


def declare_optimizer(tables: EmbeddingTables, optimizer: SparseOptimizer) -> None:
    """Tell TorchRec, before sharding, which optimizer the tables' kernels fuse into backward."""
    for name, weight in tables.named_parameters():
        _optimize_in_backward(weight, tables.schema.table(name.split(".")[-2]), optimizer)


def _optimize_in_backward(
    weight: nn.Parameter, table: TableConfig, optimizer: SparseOptimizer
) -> None:
    settings: dict[str, Any] = {"lr": table.learning_rate or optimizer.learning_rate}
    match optimizer:
        case RowWiseAdagrad(eps=eps, weight_decay=decay):
            kind: type[torch.optim.Optimizer] = FusedRowWiseAdagrad
            settings |= {"eps": eps} | _l2_decay(decay)
        case Adagrad(eps=eps):
            kind = fused.Adagrad
            settings |= {"eps": eps}
        case Adam():
            kind = fused.Adam
            settings |= optimizer.model_dump(include={"beta1", "beta2", "eps", "weight_decay"})
        case Sgd():
            kind = fused.SGD
    optimizer_in_backward(kind, [weight], settings)


def _l2_decay(weight_decay: float) -> dict[str, Any]:
    # Without a mode the kernel ignores the weight decay.
    mode = WeightDecayMode.L2 if weight_decay else WeightDecayMode.NONE
    return {"weight_decay": weight_decay, "weight_decay_mode": mode}


def _row_optimizer(
    replicated: dict[str, nn.Parameter], schema: FeatureSchema, optimizer: SparseOptimizer
) -> KeyedOptimizerWrapper | None:
    if not replicated:
        return None
    rates = [
        schema.table(name.split(".")[-2]).learning_rate or optimizer.learning_rate
        for name in replicated
    ]
    return KeyedOptimizerWrapper(
        replicated,
        lambda params: RowOptimizer(zip(params, rates, strict=True), optimizer),
    )


def _combine(
    fused_optimizer: KeyedOptimizer,
    rows: KeyedOptimizerWrapper | None,
    dense: KeyedOptimizerWrapper | None,
) -> CombinedOptimizer:
    named = [("tables", fused_optimizer), ("replicated_tables", rows), ("dense", dense)]
    return CombinedOptimizer([(name, part) for name, part in named if part is not None])

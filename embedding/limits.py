"""What a device and a collection can do, said at validation time; imports nothing heavy."""

from embedding.config import (
    Adam,
    ColumnWise,
    DataParallel,
    Grid,
    ManagedCollision,
    RowWise,
    RowWiseAdagrad,
    ShardingConfig,
    SparseOptimizer,
    TableColumnWise,
    TableConfig,
    TableWise,
)
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema

COLUMN_MULTIPLE = 4
"""The TBE kernels need every shard's width to be a multiple of this."""
ELEMENT_BYTES = 4
"""Tables and optimizer states are float32."""


def check_support(
    schema: FeatureSchema, optimizer: SparseOptimizer, sharding: ShardingConfig, device_type: str
) -> None:
    """Raise UserError for the first thing asked for that cannot run on `device_type`."""
    check_optimizer(optimizer, device_type)
    check_communication(sharding, device_type)
    check_kernels(sharding, device_type)
    for table in schema.tables:
        check_table(table, in_sequence=table.name in schema.sequence_tables)


def check_optimizer(optimizer: SparseOptimizer, device_type: str) -> None:
    """Refuse sparse optimizers, and settings of them, that the fused kernels lack."""
    if optimizer.kind == "adam" and device_type == "cpu":
        raise UserError(
            "embedding.optimizer: 'adam' has a fused kernel for CUDA only, and the tables are on "
            "CPU; use 'row_wise_adagrad' or 'adagrad', or train on GPUs (cluster.use_gpu)"
        )
    decays = isinstance(optimizer, RowWiseAdagrad | Adam) and optimizer.weight_decay
    if decays and device_type == "cpu":
        raise UserError(
            f"embedding.optimizer: {optimizer.kind!r} has weight_decay={decays:g}, which its fused "
            "kernel ignores on cpu; set it to 0 and embedding.l2 instead, which works everywhere, "
            "or train on GPUs (cluster.use_gpu)"
        )


def check_communication(sharding: ShardingConfig, device_type: str) -> None:
    """Refuse precisions that the CPU backend would silently replace."""
    if sharding.communication == "bf16" and device_type == "cpu":
        raise UserError(
            "embedding.sharding.communication: bf16 is not supported by gloo on CPU; use fp16 or "
            "fp32 there, bf16 on GPUs (cluster.use_gpu)"
        )


def check_kernels(sharding: ShardingConfig, device_type: str) -> None:
    """Refuse to leave out the one kernel that there is on CPU."""
    if device_type == "cpu" and "fused" not in sharding.kernels:
        raise UserError(
            f"embedding.sharding.kernels: {list(sharding.kernels)} keep tables in host memory for "
            "GPUs, and on CPU, where all tables are there, the only kernel is fused; add it, or "
            "train on GPUs (cluster.use_gpu)"
        )


def check_table(table: TableConfig, *, in_sequence: bool) -> None:
    """Refuse a forced sharding type that the table's collection or width does not allow."""
    where = f"features.tables.{table.name}.sharding"
    match table.sharding:
        case None:
            return
        case ColumnWise(num_shards=n) | TableColumnWise(num_shards=n) | Grid(num_column_shards=n):
            if table.embedding_dim % (n * COLUMN_MULTIPLE):
                raise UserError(
                    f"{where}: {n} column shards of {table.embedding_dim} columns are not "
                    f"multiples of {COLUMN_MULTIPLE} columns wide; use one of {_shards(table)}"
                )
        case _:
            pass
    if isinstance(table.ids, ManagedCollision) and not isinstance(table.sharding, RowWise):
        raise UserError(
            f"{where}: managed collision works with row_wise sharding only, not "
            f"{table.sharding.kind}; use row_wise or leave the sharding out"
        )
    if in_sequence and not isinstance(
        table.sharding, TableWise | RowWise | ColumnWise | DataParallel
    ):
        raise UserError(
            f"{where}: {table.sharding.kind} works for pooled tables only, and this "
            "one is looked up without pooling (a sequence uses it); use row_wise, table_wise, "
            "column_wise or data_parallel"
        )


def _shards(table: TableConfig) -> str:
    """Numbers of column shards that the width allows."""
    units = table.embedding_dim // COLUMN_MULTIPLE
    return ", ".join(str(n) for n in range(1, units + 1) if units % n == 0)

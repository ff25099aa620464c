"""Configuration of the sparse side: tables, sparse optimizers, sharding.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embedding.names import ModuleName

MISSING_ID = -1
"""Raw id of a missing value in samples; every id scheme maps it to the OOV row."""

OOV_ROW = 0
"""The row that missing and unknown ids share."""


class StrictConfig(BaseModel):
    """Frozen; unknown keys, NaN and infinity are errors; a field's docstring documents it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


# --- id schemes: raw id -> row of the table ------------------------------------------------------


class Hashed(StrictConfig):
    """Row = 1 + hash(raw id) mod (num_embeddings - 1); row 0 is the OOV row.

    Ids may collide; the report says how many do, by table.
    """

    kind: Literal["hashed"] = "hashed"


class Identity(StrictConfig):
    """Row = raw id + 1; ids outside [0, num_embeddings - 1) go to the OOV row.

    The report counts them, by table.
    """

    kind: Literal["identity"] = "identity"


class ManagedCollision(StrictConfig):
    """TorchRec managed collision: every frequent id owns a row; the others are evicted."""

    kind: Literal["managed_collision"] = "managed_collision"
    eviction: Literal["lfu", "lru", "distance_lfu"] = "lfu"
    eviction_interval_steps: PositiveInt = 100
    """Steps between two evictions; ids seen in between wait for a row."""


IdScheme = Annotated[Hashed | Identity | ManagedCollision, Field(discriminator="kind")]


# --- sharding ------------------------------------------------------------------------------------


class DataParallel(StrictConfig):
    """The whole table on every rank; gradients are all-reduced. For small tables."""

    kind: Literal["data_parallel"] = "data_parallel"


class TableWise(StrictConfig):
    """The whole table on one rank."""

    kind: Literal["table_wise"] = "table_wise"


class RowWise(StrictConfig):
    """Rows split over all ranks."""

    kind: Literal["row_wise"] = "row_wise"


class ColumnWise(StrictConfig):
    """Columns split into `num_shards` shards, placed on any rank."""

    kind: Literal["column_wise"] = "column_wise"
    num_shards: PositiveInt = 2


class TableRowWise(StrictConfig):
    """Rows split over the ranks of one host."""

    kind: Literal["table_row_wise"] = "table_row_wise"


class TableColumnWise(StrictConfig):
    """Columns split over the ranks of one host."""

    kind: Literal["table_column_wise"] = "table_column_wise"
    num_shards: PositiveInt = 2


class Grid(StrictConfig):
    """Columns split over hosts, rows of each column shard over the ranks of its host."""

    kind: Literal["grid"] = "grid"
    num_column_shards: PositiveInt = 2


Sharding = Annotated[
    DataParallel | TableWise | RowWise | ColumnWise | TableRowWise | TableColumnWise | Grid,
    Field(discriminator="kind"),
]


# --- sparse optimizers ---------------------------------------------------------------------------


class RowWiseAdagrad(StrictConfig):
    """Adagrad with one accumulator per row: the usual choice for huge tables."""

    kind: Literal["row_wise_adagrad"] = "row_wise_adagrad"
    learning_rate: PositiveFloat = 0.02
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class Adagrad(StrictConfig):
    """Adagrad with one accumulator per element."""

    kind: Literal["adagrad"] = "adagrad"
    learning_rate: PositiveFloat = 0.02
    eps: PositiveFloat = 1e-8


class Adam(StrictConfig):
    """Adam on the touched rows. Its fused kernel exists for CUDA only."""

    kind: Literal["adam"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class Sgd(StrictConfig):
    """Plain SGD, no state."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = 0.1


SparseOptimizer = Annotated[RowWiseAdagrad | Adagrad | Adam | Sgd, Field(discriminator="kind")]


# --- tables and features -------------------------------------------------------------------------


class TableConfig(StrictConfig):
    """One embedding table; several features may share it."""

    name: ModuleName
    num_embeddings: PositiveInt
    """Rows, the OOV row included."""
    embedding_dim: PositiveInt = 16
    """Columns; a multiple of 4, as the TBE kernels require."""
    ids: IdScheme = Hashed()
    """How raw ids become rows."""
    learning_rate: PositiveFloat | None = None
    """Overrides the sparse optimizer's learning rate for this table."""
    init_bound: PositiveFloat | None = None
    """Rows start uniform in [-init_bound, init_bound]; default 1 / sqrt(num_embeddings)."""
    sharding: Sharding | None = None
    """Forces a sharding type; by default the planner chooses."""

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if self.embedding_dim % 4:
            raise ValueError(
                f"table {self.name!r}: embedding_dim={self.embedding_dim} must be a multiple of 4; "
                f"use {self.embedding_dim + -self.embedding_dim % 4}"
            )
        if self.num_embeddings < 2:
            raise ValueError(
                f"table {self.name!r}: num_embeddings={self.num_embeddings} leaves no row beside "
                "the OOV row; use at least 2"
            )
        return self


TablePrecision = Literal["fp32", "int8"]
"""Of tables that are looked up and no longer trained; `int8`: see `embedding.int8_rows`."""


class ShardingConfig(StrictConfig):
    """How the tables are placed on ranks and talk to each other."""

    communication: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of looked-up vectors on the wire. Of their gradients: bf16 with fp16, too, which
    would round those of most negatives to zero; fp32 on CPU."""
    ranks_per_host: PositiveInt | None = None
    """Default: what the cluster reports. Set it to test hierarchical sharding on one machine."""
    hbm_gib: PositiveFloat | None = None
    """Memory per rank the plan may use, on every topology; default: what the device has."""
    kernels: Annotated[
        tuple[Literal["fused", "fused_uvm", "fused_uvm_caching"], ...], Field(min_length=1)
    ] = ("fused", "fused_uvm", "fused_uvm_caching")
    """Kernels the plan may use on CUDA; the last two keep a table in host memory."""
    plan: Path | None = None
    """A plan file to train with (`braid plan --json`); default: plan for the cluster."""
    calibration: Path | None = None
    """Measured constants of this cluster (`braid bench plan --calibrate`); default: data sheet."""
    traffic: Path | None = None
    """Measured lookups of the tables (`braid traffic --json`); default: greatest lengths."""

"""Configuration of the sparse side: tables, features, sparse optimizers, sharding.

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
    field_validator,
    model_validator,
)

from embedding.errors import not_among
from embedding.names import ModuleName, Name

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

Source = Literal["events", "items", "users", "codes"]
"""`codes` features are derived from a recipe's semantic codes and not written by hand."""


class SparseFeature(StrictConfig):
    """Ids of a column of `source`, looked up in a table; those of a list are pooled."""

    name: Name
    table: str
    source: Source = "events"
    column: str | None = None
    """Column of the source; default: the feature's name."""
    pooling: Literal["sum", "mean"] = "sum"
    max_length: PositiveInt | None = None
    """List columns only: keep the first `max_length` ids of a row."""

    @property
    def column_name(self) -> str:
        """Column of the source this feature reads."""
        return self.column or self.name


class DenseFeature(StrictConfig):
    """One float column."""

    name: Name
    source: Source = "events"
    column: str | None = None
    """Column of the source; default: the feature's name."""
    transform: Literal["none", "log1p"] = "none"
    """`log1p` is sign(x) * log(1 + |x|)."""
    mean: float = 0.0
    """Subtracted after the transform."""
    std: PositiveFloat = 1.0
    """Divides after the mean is subtracted."""
    missing: float = 0.0
    """Value of a null, after the transform and scaling."""

    @property
    def column_name(self) -> str:
        """Column of the source this feature reads."""
        return self.column or self.name


class HistoryConfig(StrictConfig):
    """The user's latest events strictly before each event, computed point-in-time by ingest."""

    name: ModuleName
    label: str | None = None
    """Only events whose label column is 1 enter; by default every event enters. With `columns`:
    what is true of the events in the lists; pairs for codes are made of such events."""
    max_length: PositiveInt = 50
    """Latest events kept."""
    columns: dict[str, str] | None = None
    """The log delivers this history, and ingest computes none: list columns of each event, oldest
    first, by what they hold. `item_id` is needed, `timestamp` where a sequence reads `gap`, and
    every column of past events that a sequence reads."""

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        if columns is not None and "item_id" not in columns:
            raise ValueError(
                "the items of a delivered history are missing; name their column: item_id"
            )
        return columns


class SequenceFeature(StrictConfig):
    """One attribute of every event of a history, oldest first, looked up without pooling."""

    name: Name
    history: str
    table: str
    source: Literal["events", "items", "gap", "codes"] = "items"
    """`events`: a column of the past event; `items`: a column of its item (`item_id` included);
    `gap`: floor(log2(1 + seconds)) between the past event and the sample; `codes`: derived."""
    column: str | None = None
    """Column of the source; default: the feature's name. Unused for `gap`."""
    target: str | None = None
    """Sparse feature of the candidate that target attention compares this one with; both must
    use the same table."""

    @property
    def column_name(self) -> str:
        """Column of the source this feature reads."""
        return self.column or self.name


class FeatureSchema(StrictConfig):
    """The data contract: which columns feed which tables. Feature names are unique."""

    tables: tuple[TableConfig, ...]
    sparse: tuple[SparseFeature, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    histories: tuple[HistoryConfig, ...] = ()
    sequences: tuple[SequenceFeature, ...] = ()

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        tables = [table.name for table in self.tables]
        histories = [history.name for history in self.histories]
        sparse = {feature.name: feature for feature in self.sparse}
        _refuse_duplicates("table", tables)
        _refuse_duplicates("history", histories)
        features = [*(f.name for f in self.id_features), *(f.name for f in self.dense)]
        _refuse_duplicates("feature", features)
        for feature in self.id_features:
            if feature.table not in tables:
                raise ValueError(
                    f"feature {feature.name!r}: table {not_among(feature.table, 'tables', tables)}"
                )
        for sequence in self.sequences:
            if sequence.history not in histories:
                raise ValueError(
                    f"sequence {sequence.name!r}: history "
                    f"{not_among(sequence.history, 'histories', histories)}"
                )
            history = self.histories[histories.index(sequence.history)]
            wanted = {"gap": "timestamp", "events": sequence.column_name}.get(sequence.source)
            if history.columns is not None and wanted not in (None, *history.columns):
                raise ValueError(
                    f"sequence {sequence.name!r}: the log delivers history {history.name!r}, and "
                    f"its columns {sorted(history.columns)} lack {wanted!r}; name the list column "
                    "that holds it, or leave the sequence out"
                )
            if sequence.target is None:
                continue
            target = sparse.get(sequence.target)
            if target is None or target.table != sequence.table:
                raise ValueError(
                    f"sequence {sequence.name!r}: target {sequence.target!r} must be a sparse "
                    f"feature on the same table {sequence.table!r}; attention compares rows of one "
                    "table"
                )
        used = {feature.table for feature in self.id_features}
        unused = [name for name in tables if name not in used]
        if unused:
            raise ValueError(f"tables {unused} are used by no feature; remove them")
        return self

    @property
    def id_features(self) -> tuple["SparseFeature | SequenceFeature", ...]:
        """All features that are looked up in tables."""
        return (*self.sparse, *self.sequences)

    @property
    def sequence_tables(self) -> frozenset[str]:
        """Tables that a sequence reads.

        They live in the `EmbeddingCollection`, and so do all sparse features on them: one table
        cannot be shared between an `EmbeddingCollection` and an `EmbeddingBagCollection`.
        """
        return frozenset(feature.table for feature in self.sequences)

    @property
    def pooled_features(self) -> tuple[SparseFeature, ...]:
        """Sparse features looked up in the `EmbeddingBagCollection`."""
        return tuple(f for f in self.sparse if f.table not in self.sequence_tables)

    @property
    def unpooled_features(self) -> tuple[SparseFeature, ...]:
        """Sparse features that share a table with a sequence: looked up unpooled, pooled after."""
        return tuple(f for f in self.sparse if f.table in self.sequence_tables)

    def table(self, name: str) -> TableConfig:
        """The table called `name`."""
        return next(table for table in self.tables if table.name == name)


def _refuse_duplicates(what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} names must be unique; {twice} appear more than once")


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

"""The data contract: which columns of which source feed which tables.

Imports pydantic and nothing heavy, as `embedding.config`.
"""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from embedding.config import StrictConfig, TableConfig
from embedding.errors import not_among
from embedding.names import ModuleName, Name

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
    delay_s: NonNegativeInt = 0
    """Seconds after an event until it enters. What is true of it must be known by then: 0 fits a
    click, but a purchase that follows hours later would tell the events in between what is to
    come. A service must hold events back as long."""
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

    @model_validator(mode="after")
    def _check_delay(self) -> Self:
        if self.delay_s and self.columns is not None:
            raise ValueError(
                f"history {self.name!r}: delay_s={self.delay_s} is for a history that ingest "
                "computes, and the log delivers this one; leave it out"
            )
        return self


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

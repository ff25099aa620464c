"""Which columns of the data contract a recipe reads, and as what."""

from collections.abc import Iterable
from typing import Literal, Self

from embedding.config import StrictConfig
from embedding.feature_schema import FeatureSchema, Source
from pipeline.config import Recipe

_VALUES_PER_ROW = 16
"""Numbers that an event without lists holds, about."""
KEY_COLUMNS = ("request_id", "user_id", "item_id")
"""Id columns that every event has; `timestamp` is the fourth key."""


class ColumnKind(StrictConfig):
    """What a categorical column of the event log holds: an id of another type is another id."""

    values: Literal["integer", "string", "any"]
    """any: nothing but nulls."""
    is_list: bool = False


class SourceColumns(StrictConfig):
    """Columns of one source (events, items or users), without its keys."""

    ids: tuple[str, ...]
    """Read as raw ids (by sparse and sequence features)."""
    sequence: tuple[str, ...] = ()
    """Those of `ids` that sequences read: one id a row, no lists."""
    dense: tuple[str, ...]
    """Read as floats."""


class LoggedHistory(StrictConfig):
    """A history that the log delivers."""

    columns: dict[str, str]
    """List column of the events by what it holds: `item_id`, `timestamp`, or what a sequence
    reads."""
    max_length: int


class EventColumns(SourceColumns):
    """Columns of the events."""

    labels: tuple[str, ...]
    """0/1 columns, null where the task is not observed."""
    weights: dict[str, str]
    """Column with the weights of each task's rows, null where 1; tasks without one are left out."""
    oracles: dict[str, str]
    """Column with the true probability of each task; optional in the files."""
    history_values: dict[str, tuple[str, ...]]
    """By computed history: columns of the past events that its sequences read."""
    logged: dict[str, LoggedHistory] = {}
    """By name."""
    lists: frozenset[str] = frozenset()
    """Those of `ids` that hold lists in some file: single ids of others become lists of one."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The event columns that `recipe` reads."""
        features, tasks = recipe.features, recipe.ranking.tasks
        values = {
            history.name: _unique(
                sequence.column_name
                for sequence in features.sequences
                if sequence.source == "events" and sequence.history == history.name
            )
            for history in features.histories
            if history.columns is None
        }
        columns = source_columns(features, "events")
        keys = (*KEY_COLUMNS, "timestamp")
        past = [name for names in values.values() for name in names if name not in keys]
        return cls(
            ids=_unique(name for name in (*columns.ids, *past) if name not in keys),
            sequence=_unique(past),
            dense=columns.dense,
            labels=_unique(task.label_name for task in tasks),
            weights=recipe.ranking.sample_weights,
            oracles={task.name: task.oracle_name for task in tasks},
            history_values=values,
            logged={
                history.name: LoggedHistory(columns=history.columns, max_length=history.max_length)
                for history in features.histories
                if history.columns is not None
            },
        )

    @property
    def required(self) -> tuple[str, ...]:
        """All columns that every event file must have."""
        own = (*self.labels, *self.ids, *self.dense, *self.weights.values())
        lists = (name for history in self.logged.values() for name in history.columns.values())
        return _unique((*KEY_COLUMNS, "timestamp", *own, *lists))

    def number_column(self, name: str) -> str:
        """Column of an ingested event with the numbers of a dense column.

        Where features read a column as ids, too, those have its name: ids are no numbers, as
        negative ones lose their sign.
        """
        return number_beside_ids(name) if name in (*KEY_COLUMNS, *self.ids) else name

    @property
    def row_weight(self) -> float:
        """How many rows without logged histories take the memory of one row, about."""
        values = sum(own.max_length * len(own.columns) for own in self.logged.values())
        return 1 + values / _VALUES_PER_ROW

    @property
    def history_columns(self) -> dict[str, tuple[str, ...]]:
        """By history: what an ingested event holds of each of its past events."""
        computed = {
            name: _unique(("item_id", "timestamp", *values))
            for name, values in self.history_values.items()
        }
        return computed | {name: tuple(own.columns) for name, own in self.logged.items()}


def history_column(history: str, column: str) -> str:
    """Column of an ingest event file: one attribute of every event of a history."""
    return f"history:{history}:{column}"


def number_beside_ids(name: str) -> str:
    """Column of an ingest event file: the numbers of a column that holds ids there."""
    return f"number:{name}"


def source_columns(features: FeatureSchema, source: Source) -> SourceColumns:
    """Columns of `source` that sparse, dense and sequence features read, its own id excluded."""
    own_id = {"events": "", "items": "item_id", "users": "user_id"}[source]
    sparse = [f.column_name for f in features.sparse if f.source == source]
    past = [f.column_name for f in features.sequences if f.source == source == "items"]
    return SourceColumns(
        ids=_unique(name for name in (*sparse, *past) if name != own_id),
        sequence=_unique(name for name in past if name != own_id),
        dense=_unique(f.column_name for f in features.dense if f.source == source),
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))

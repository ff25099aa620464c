"""A request as rows of ingested events, one a candidate, for `pipeline.samples.join_rows`.

    request                                  events
    user 7, candidates [3, 5]                user_id  item_id  hour  history:clicks:item_id
    context {hour: 20}                       7        3        20    [1, 2]
    histories {clicks: {item_id: [1, 2]}}    7        5        20    [1, 2]

What training took from the log and ingest is checked here: a column that is forgotten would be one
that is missing in every row, and no score would show it.
"""

# Shapes: N candidates of a request, S events of a history.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.serving.wire import ContextValue, RequestForm, ScoreRequest
from embedding.errors import UserError
from embedding.raw_ids import Int64Array, ids_or_missing, to_raw_ids
from pipeline.samples.columns import KEY_COLUMNS, history_column, source_columns
from pipeline.samples.contract import as_float32
from pipeline.samples.join_rows import FeatureSources

_KINDS = {"integer": int, "string": str}


@dataclass(frozen=True)
class EventForm:
    """Which columns the events of a model's requests have."""

    ids: tuple[str, ...]
    """Read of the event itself, as ids."""
    dense: tuple[str, ...]
    labels: tuple[str, ...]
    weights: tuple[str, ...]
    histories: dict[str, tuple[str, ...]]
    max_lengths: dict[str, int]
    """By history."""
    item_kind: str
    user_kind: str | None

    @classmethod
    def of(cls, sources: FeatureSources) -> "EventForm":
        """Of the recipe, and the ids of its catalogue."""
        recipe = sources.recipe
        own = source_columns(recipe.features, "events")
        keys = (*KEY_COLUMNS, "timestamp")
        root = recipe.data.root
        users = root / "users.parquet"
        item_kind = _kind(pq.read_schema(root / "items.parquet").field("item_id").type)
        return cls(
            ids=tuple(name for name in own.ids if name not in keys),
            dense=own.dense,
            labels=sources.columns.labels,
            weights=tuple(dict.fromkeys(sources.columns.weights.values())),
            histories=sources.columns.history_columns,
            max_lengths={h.name: h.max_length for h in recipe.features.histories},
            item_kind=item_kind,
            user_kind=_kind(pq.read_schema(users).field("user_id").type)
            if users.exists()
            else None,
        )

    @property
    def context(self) -> tuple[str, ...]:
        """Columns that a request gives beside its ids and histories."""
        return tuple(dict.fromkeys((*self.ids, *self.dense)))

    def told(self) -> RequestForm:
        """As the service describes it."""
        return RequestForm.model_validate(
            {
                "context": list(self.context),
                "histories": {name: list(columns) for name, columns in self.histories.items()},
                "item_id": self.item_kind,
                "user_id": self.user_kind,
            }
        )


def event_rows(request: ScoreRequest, form: EventForm, now_ms: int) -> pa.RecordBatch:
    """The rows of one request.

    Args:
        request: as it came.
        form: of the model that is to score it.
        now_ms: time of the event where the request has none.

    Raises:
        UserError: the request lacks something, or has what the model does not know.
    """
    count = len(request.candidates)
    _require_kind("candidates", request.candidates, form.item_kind)
    if form.user_kind is not None:
        _require_kind("user_id", [request.user_id], form.user_kind)
    _require_columns(request, form)
    timestamp = now_ms if request.timestamp is None else request.timestamp
    zeros = np.zeros(count, np.int64)
    data: dict[str, pa.Array] = {
        "request_id": pa.array(zeros),
        "user_id": _ids("user_id", [request.user_id]).take(pa.array(zeros)),
        "item_id": _ids("candidates", request.candidates),
        "timestamp": pa.array(np.full(count, timestamp, np.int64)),
    }
    data |= {name: pa.nulls(count, pa.int64()) for name in form.labels}
    data |= {name: pa.nulls(count, pa.float32()) for name in form.weights}
    for name in form.context:
        values, take = _context(request, name, zeros)
        column = _ids(name, values) if name in form.ids else _floats(name, values)
        data[name] = column if take is None else column.take(take)
    for history, columns in form.histories.items():
        lists = _history(request, history, columns, timestamp, form)
        data |= {
            name: pa.array([one], pa.list_(pa.int64())).take(pa.array(zeros))
            for name, one in lists.items()
        }
    return pa.RecordBatch.from_pydict(data)


def together(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of several requests; a column that is a list in one of them is one in all."""
    columns = {}
    for name in batches[0].schema.names:
        parts = [batch[name] for batch in batches]
        if len({part.type for part in parts}) > 1:
            parts = [_as_lists(part) for part in parts]
        columns[name] = pa.concat_arrays(parts)
    return pa.RecordBatch.from_pydict(columns)


def _require_columns(request: ScoreRequest, form: EventForm) -> None:
    given = [*request.context, *request.candidate_context]
    _require_names("context", given, form.context)
    twice = set(request.context) & set(request.candidate_context)
    if twice:
        raise UserError(f"{sorted(twice)} are in context and in candidate_context; give each once")
    for name, values in request.candidate_context.items():
        if len(values) != len(request.candidates):
            raise UserError(
                f"candidate_context.{name} has {len(values)} values and there are "
                f"{len(request.candidates)} candidates; give one a candidate"
            )
    _require_names("histories", request.histories, form.histories)
    for name, columns in form.histories.items():
        _require_names(f"histories.{name}", request.histories[name], columns)
        lengths = {column: len(values) for column, values in request.histories[name].items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"lists of histories.{name} differ in length: {lengths}")


def _require_names(where: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    given, wanted = list(given), list(wanted)
    lacking = [name for name in wanted if name not in given]
    if lacking:
        raise UserError(
            f"{where} lacks {lacking}, which the model was trained with; give them, and null (of a "
            "history: empty lists) where nothing is known"
        )
    strange = [name for name in given if name not in wanted]
    if strange:
        raise UserError(f"{where} has {strange}, which the model does not read; it reads {wanted}")


def _require_kind(where: str, ids: Sequence[int | str | None], kind: str) -> None:
    for value in ids:
        if not isinstance(value, _KINDS[kind]):
            raise UserError(
                f"{where}: {value!r} is no {kind}, and the ids of the catalogue are; an id of "
                "another type is another id"
            )


def _context(
    request: ScoreRequest, name: str, zeros: Int64Array
) -> tuple[Sequence[ContextValue], pa.Array | None]:
    """Values of a column, and how they are spread over the candidates (None: one each)."""
    if name in request.candidate_context:
        return request.candidate_context[name], None
    return [request.context[name]], pa.array(zeros)


def _ids(where: str, values: Sequence[ContextValue]) -> pa.Array:
    try:
        raw = to_raw_ids(pa.array(values))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(
            f"{where}: {_shown(values)} are no ids; integers or strings, or lists of them, all of "
            "one type"
        ) from error
    return raw.cast(pa.int64()) if pa.types.is_null(raw.type) else raw


def _floats(where: str, values: Sequence[ContextValue]) -> pa.Array:
    try:
        numbers = [float(value) if isinstance(value, bool) else value for value in values]
        column = as_float32(pa.array(numbers, pa.float64()))
    except (pa.ArrowException, TypeError) as error:
        raise UserError(f"{where}: {_shown(values)} are no numbers") from error
    if not np.isfinite(column.drop_null().to_numpy()).all():
        raise UserError(f"{where}: {_shown(values)} are not finite as float32; null is missing")
    return column


def _history(
    request: ScoreRequest, name: str, columns: Sequence[str], timestamp: int, form: EventForm
) -> Mapping[str, Int64Array]:
    """Columns of one history: the latest events before the request's time, as raw ids and times."""
    given = request.histories[name]
    _require_kind(f"histories.{name}.item_id", given["item_id"], form.item_kind)
    lists = {}
    for column in columns:
        if column == "timestamp":
            _require_kind(f"histories.{name}.timestamp", given[column], "integer")
            lists[column] = np.asarray(given[column], np.int64)
        else:
            lists[column] = ids_or_missing(_ids(f"histories.{name}.{column}", given[column]))
    if "timestamp" in lists:
        times_S = lists["timestamp"]
        if (np.diff(times_S) < 0).any():
            raise UserError(f"histories.{name} is not ordered by time, oldest first; sort it")
        # As in training: what is not strictly earlier is not seen.
        seen = int(np.searchsorted(times_S, timestamp, side="left"))
        lists = {column: values_S[:seen] for column, values_S in lists.items()}
    longest = form.max_lengths[name]
    return {history_column(name, column): values_S[-longest:] for column, values_S in lists.items()}


def _as_lists(column: pa.Array) -> pa.ListArray:
    """One id a row as a list of one; a null is a null list, as in the log."""
    if pa.types.is_list(column.type):
        return column
    offsets = pa.array(np.arange(len(column) + 1, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, column, mask=column.is_null())


def _kind(kind: pa.DataType) -> str:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return "integer" if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else "string"


def _shown(values: Sequence[ContextValue]) -> str:
    return f"{str(values[:3])[:-1]}, ...]" if len(values) > 3 else str(values)

"""A request as ingested events, one a candidate, for `pipeline.samples.join_rows`.

    request                                  events
    user 7, candidates [3, 5]                user_id  item_id  hour  history:clicks:item_id
    context {hour: 20}                       7        3        20    [1, 2]
    histories {clicks: {item_id: [1, 2]}}    7        5        20    [1, 2]

What training took from the log and ingest is checked here: a column that is forgotten, or whose ids
are written in another way, would be missing in every row, and no score would show it.
"""

# Shapes: N candidates of a request, S events of a history.

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deploy.serving.wire import ContextForm, ContextValue, RequestForm, ScoreRequest
from embedding.errors import UserError
from embedding.raw_ids import Int64Array, ids_or_missing, to_raw_ids
from pipeline.config import Recipe
from pipeline.samples.columns import (
    KEY_COLUMNS,
    ColumnKind,
    EventColumns,
    history_column,
    source_columns,
)
from pipeline.samples.contract import as_float32

_NUMBER = "number"
_LEAST_ID, _ID_BOUND = -(2**63), 2**64
"""Of integers that a signed or an unsigned column of the log holds."""
_MASK_63 = 2**63 - 1
_WRITTEN = {"integer": (int, bool), "string": (str,), "any": (int, bool, str)}


@dataclass(frozen=True)
class EventForm:
    """Which columns the events of a model's requests have."""

    asked: RequestForm
    labels: tuple[str, ...]
    weights: tuple[str, ...]
    history_delays: dict[str, int]
    """Seconds after which an event enters, by history."""
    history_lengths: dict[str, int]
    """Past events that are read, at most."""
    list_lengths: dict[str, int | None]
    """Values that features read of a list, by context column; None: all."""
    numbers: dict[str, str]
    """Event column by context column that dense features read."""

    @classmethod
    def of(cls, recipe: Recipe, kinds: Mapping[str, ColumnKind]) -> "EventForm":
        """Of a recipe, and of the log that it was trained on.

        Raises:
            UserError: it is not known what the log held.
        """
        columns, own = EventColumns.of(recipe), source_columns(recipe.features, "events")
        ids = [name for name in own.ids if name not in (*KEY_COLUMNS, "timestamp")]
        histories = _history_kinds(recipe, columns, kinds)
        lacking = [name for name in ("user_id", "item_id", *ids) if name not in kinds]
        if lacking:
            raise UserError(
                f"the bundle does not say what the columns {lacking} of its event log held, which "
                "requests are compared with: its days were ingested before that was recorded; "
                "serve one of a later day, or make its days in another --out"
            )
        list_lengths: dict[str, int | None] = {}
        for name in ids:
            readers = [f for f in recipe.features.sparse if f.column_name == name]
            longest = [f.max_length for f in readers if f.source == "events"]
            list_lengths[name] = None if None in longest else max(filter(None, longest))
        asked = RequestForm(
            user_id=kinds["user_id"].values,
            item_id=kinds["item_id"].values,
            context={n: ContextForm(values=kinds[n].values, is_list=kinds[n].is_list) for n in ids}
            | {name: ContextForm(values=_NUMBER) for name in own.dense if name not in ids},
            histories=histories,
        )
        weights = tuple(dict.fromkeys(columns.weights.values()))
        delays = {h.name: h.delay_s for h in recipe.features.histories}
        lengths = {h.name: h.max_length for h in recipe.features.histories}
        numbers = {name: columns.number_column(name) for name in own.dense}
        return cls(asked, columns.labels, weights, delays, lengths, list_lengths, numbers)


@dataclass(frozen=True)
class EventRows:
    """The rows of one request: what all have is held once."""

    own: dict[str, pa.Array]
    """N values a column."""
    shared: dict[str, pa.Array]
    """One value a column."""

    def __len__(self) -> int:
        return len(self.own["item_id"])

    def spread(self) -> pa.RecordBatch:
        """One row a candidate."""
        zeros = pa.array(np.zeros(len(self), np.int64))
        shared = {name: column.take(zeros) for name, column in self.shared.items()}
        return pa.RecordBatch.from_pydict({**shared, **self.own})

    @staticmethod
    def blank(form: EventForm) -> "EventRows":
        """One row of which nothing is known."""
        asked = form.asked
        request = ScoreRequest(
            user_id="" if asked.user_id == "string" else 0,
            candidates=["" if asked.item_id == "string" else 0],
            timestamp=0,
            context=dict.fromkeys(asked.context),
            histories={h: {c: [] for c in names} for h, names in asked.histories.items()},
        )
        return event_rows(request, form, now_ms=0)


def event_rows(request: ScoreRequest, form: EventForm, now_ms: int) -> EventRows:
    """The rows of one request.

    Args:
        request: as it came.
        form: of the model that is to score it.
        now_ms: time of the event where the request has none.

    Raises:
        UserError: the request lacks something, or has what the model does not know.
    """
    asked = form.asked
    _require_columns(request, form)
    timestamp = now_ms if request.timestamp is None else request.timestamp
    own = {"item_id": _ids("candidates", request.candidates, asked.item_id)}
    shared = {
        "request_id": pa.array([0], pa.int64()),
        "user_id": _ids("user_id", [request.user_id], asked.user_id),
        "timestamp": pa.array([timestamp], pa.int64()),
    }
    shared |= {name: pa.nulls(1, pa.int64()) for name in form.labels}
    shared |= {name: pa.nulls(1, pa.float32()) for name in form.weights}
    for name in asked.context:
        if name in request.candidate_context:
            own |= _context(name, request.candidate_context[name], form)
        else:
            shared |= _context(name, [request.context[name]], form)
    for history in asked.histories:
        for name, values_S in _history(request, history, timestamp, form).items():
            shared[name] = pa.array([values_S], pa.list_(pa.int64()))
    return EventRows(own, shared)


def together(requests: Sequence[EventRows]) -> pa.RecordBatch:
    """The rows of several requests, one after the other."""
    batches = [request.spread() for request in requests]
    names = batches[0].schema.names
    return pa.RecordBatch.from_pydict(
        {name: pa.concat_arrays([batch[name] for batch in batches]) for name in names}
    )


def _history_kinds(
    recipe: Recipe, columns: EventColumns, kinds: Mapping[str, ColumnKind]
) -> dict[str, dict[str, str]]:
    """What each history holds of a past event."""
    found: dict[str, dict[str, str]] = {}
    for history in recipe.features.histories:
        logged = history.columns or {}
        found[history.name] = {}
        for name in columns.history_columns[history.name]:
            kind = kinds.get(logged.get(name, name), ColumnKind(values="any")).values
            found[history.name][name] = "integer" if name == "timestamp" else kind
    return found


def _require_columns(request: ScoreRequest, form: EventForm) -> None:
    asked = form.asked
    _require_names("context", [*request.context, *request.candidate_context], asked.context)
    twice = set(request.context) & set(request.candidate_context)
    if twice:
        raise UserError(f"{sorted(twice)} are in context and in candidate_context; give each once")
    for name, values in request.candidate_context.items():
        if len(values) != len(request.candidates):
            raise UserError(
                f"candidate_context.{name} has {len(values)} values and there are "
                f"{len(request.candidates)} candidates; give one a candidate"
            )
    _require_names("histories", request.histories, asked.histories)
    for name, columns in asked.histories.items():
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
        raise UserError(
            f"{where} has {strange[:3]}, which the model does not read; it reads {wanted}"
        )


def _context(name: str, values: Sequence[ContextValue], form: EventForm) -> dict[str, pa.Array]:
    """Event columns of a context column: ids, numbers, or both."""
    column = form.asked.context[name]
    found = {form.numbers[name]: _floats(name, values)} if name in form.numbers else {}
    return found if column.values == _NUMBER else {name: _context_ids(name, values, form), **found}


def _context_ids(name: str, values: Sequence[ContextValue], form: EventForm) -> pa.Array:
    column = form.asked.context[name]
    if not column.is_list:
        nested = [value for value in values if isinstance(value, list)]
        if nested:
            raise UserError(f"{name} holds one id, and {nested[0][:3]} is a list; choose one of it")
        return _ids(name, values, column.values, nullable=True)
    longest = form.list_lengths[name]
    lists = [_as_list(value)[:longest] for value in values if value is not None]
    flat = _ids(name, [one for part in lists for one in part], column.values, nullable=True)
    ends = np.cumsum([0, *(0 if v is None else len(_as_list(v)[:longest]) for v in values)])
    nulls = pa.array([value is None for value in values])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, mask=nulls)


def _as_list(value: ContextValue) -> list[ContextValue]:
    return list(value) if isinstance(value, list) else [value]


def _ids(
    where: str, values: Sequence[ContextValue], kind: str, *, nullable: bool = False
) -> pa.Array:
    """Raw ids of values of one kind."""
    allowed = {*_WRITTEN[kind], *((type(None),) if nullable else ())}
    if not allowed.issuperset(map(type, values)):
        strange = next(value for value in values if type(value) not in allowed)
        raise UserError(
            f"{where}: {_shown(strange)} is no {kind}, which the log holds there; an id that is "
            "written in another way is another id"
        )
    written = set(map(type, values)) - {type(None)}
    if len(written) > 1:
        names = sorted(kind.__name__ for kind in written)
        raise UserError(f"{where}: ids are written in one way, and these in several: {names}")
    if written != {str}:
        return pa.array(_raw_integers(where, values), pa.int64())
    try:
        return to_raw_ids(pa.array(values, pa.string()))
    except ValueError as error:  # half of a surrogate pair
        raise UserError(f"{where}: {error}; give integers of 64 bits, or strings") from error


def _raw_integers(where: str, values: Sequence[ContextValue]) -> list[int | None]:
    """As `to_raw_ids` of the log's column, which may be signed or unsigned."""
    numbers = [value for value in values if isinstance(value, int)]
    for bound in (min(numbers, default=0), max(numbers, default=0)):
        if not _LEAST_ID <= bound < _ID_BOUND:
            raise UserError(f"{where}: {_shown(bound)} has more than 64 bits; give smaller ids")
    return [value & _MASK_63 if isinstance(value, int) else None for value in values]


def _floats(where: str, values: Sequence[ContextValue]) -> pa.Array:
    for value in values:
        if value is not None and not isinstance(value, int | float):
            raise UserError(f"{where}: {_shown(value)} is no number, which the log holds there")
    try:
        numbers = [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    except OverflowError as error:
        raise UserError(f"{where}: a value is too large for float32") from error
    column = as_float32(pa.array(numbers, pa.float64()))
    if not np.isfinite(column.drop_null().to_numpy()).all():
        raise UserError(f"{where}: a value is not finite as float32; null stands for missing ones")
    return column


def _history(
    request: ScoreRequest, name: str, timestamp: int, form: EventForm
) -> dict[str, Int64Array]:
    """Columns of one history: the latest events before the request's time, as raw ids and times."""
    given = request.histories[name]
    lists: dict[str, Int64Array] = {}
    for column, kind in form.asked.histories[name].items():
        where = f"histories.{name}.{column}"
        if column == "timestamp":
            lists[column] = _times(where, given[column])
        else:
            nullable = column != "item_id"
            ids = _ids(where, given[column], kind, nullable=nullable)
            lists[column] = ids_or_missing(ids)
    if "timestamp" in lists:
        times_S = lists["timestamp"]
        if (np.diff(times_S) < 0).any():
            raise UserError(f"histories.{name} is not ordered by time, oldest first; sort it")
        # As in training: what is not strictly earlier is not seen.
        entered = timestamp - 1000 * form.history_delays[name]
        seen = int(np.searchsorted(times_S, entered, side="left"))
        lists = {column: values_S[:seen] for column, values_S in lists.items()}
    longest = form.history_lengths[name]
    return {history_column(name, column): values_S[-longest:] for column, values_S in lists.items()}


def _times(where: str, values: Sequence[ContextValue]) -> Int64Array:
    try:
        return np.array(pa.array(values, pa.int64()).to_numpy(), np.int64)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(
            f"{where}: times are milliseconds since 1970, and every past event has one"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."  # noqa: PLR2004 # fits on a line

"""Requests made of events that a run ingested: what its callers would have asked.

Ingest keeps ids as raw ids, and a service asks for them as the log writes them: strings are looked
up among those of the catalogue and of the log's own day.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.serving.wire import RequestForm, ScoreRequest
from embedding.config import MISSING_ID
from embedding.errors import UserError
from embedding.raw_ids import to_raw_ids
from pipeline.days import catalogue_files, day_files
from pipeline.samples.columns import history_column, number_beside_ids

_ROWS = 4096
"""Events that requests are made of, at most."""

Row = dict[str, Any]


def logged_requests(
    out: Path, data_root: Path, form: RequestForm, *, number: int, candidates: int
) -> list[ScoreRequest]:
    """Requests with the users, context and histories of the latest ingested day.

    Args:
        out: output directory of the runs.
        data_root: directory of items.parquet, users.parquet and the event log.
        form: of the model that is asked.
        number: of requests.
        candidates: of each, drawn from the catalogue.

    Raises:
        UserError: nothing was ingested, or what was lacks what the model reads.
    """
    paths = _latest_files(out)
    written = _Written(data_root, paths[0].parent.name.removeprefix("dt="))
    rows = [
        {**row, "user_id": user}
        for row in _events(paths, form)
        if (user := written.values("user_id", row["user_id"], form.user_id)) is not None
    ]
    if not rows:
        raise UserError(
            f"no user of {paths[0]} is found in {data_root} (events, users.parquet), so nobody can "
            "be asked about; name the data of these runs with --data"
        )
    items = _by_raw_id(data_root / "items.parquet", "item_id")
    shown = list(items.values())
    rng = np.random.default_rng(0)
    found = []
    for place in rng.integers(0, len(rows), number).tolist():
        row = rows[place]
        histories: dict[str, Row] = {}
        for history, kinds in form.histories.items():
            histories[history] = {
                name: written.values(name, row[history_column(history, name)], kind)
                for name, kind in kinds.items()
            }
            past = row[history_column(history, "item_id")]
            histories[history]["item_id"] = [items.get(item, shown[0]) for item in past]
        found.append(
            ScoreRequest(
                user_id=row["user_id"],
                candidates=[shown[i] for i in rng.integers(0, len(shown), candidates).tolist()],
                timestamp=row["timestamp"],
                context={
                    name: written.values(name, _whole(row, name), column.values)
                    for name, column in form.context.items()
                },
                histories=histories,
            )
        )
    return found


def _whole(row: Row, name: str) -> Any:
    """A value of an ingested event; raw ids that are numbers, too, have their sign again."""
    raw, number = row[name], row.get(number_beside_ids(name))
    return raw if number is None else raw + round((number - raw) / 2**63) * 2**63


class _Written:
    """Raw ids as a day of the log writes them."""

    def __init__(self, data_root: Path, day: str) -> None:
        self._files = [*day_files(data_root, [day]), *catalogue_files(data_root)]
        self._columns: dict[str, dict[int, int | str]] = {}

    def values(self, column: str, raw: Any, kind: str) -> Any:
        """A value of a column, or a list of them; None where it is not known how it is written."""
        if isinstance(raw, list):
            return [self.values(column, one, kind) for one in raw]
        if kind == "number":
            return raw
        if raw is None or raw == MISSING_ID:
            return None
        if kind != "string":
            return raw
        if column not in self._columns:
            known = [_by_raw_id(path, column) for path in self._files]
            self._columns[column] = {key: value for part in known for key, value in part.items()}
        return self._columns[column].get(raw)


def _latest_files(out: Path) -> list[Path]:
    paths = sorted(out.glob("????-??-??/ingest/events/dt=*/*.parquet"), key=lambda p: p.parent.name)
    if not paths:
        raise UserError(f"--out {out} holds no ingested events to make requests of; name a run's")
    return [path for path in paths if path.parent == paths[-1].parent]


def _events(paths: list[Path], form: RequestForm) -> list[Row]:
    tables: list[pa.Table] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            tables.append(pa.Table.from_batches([next(file.iter_batches(_ROWS))]))
        if sum(map(len, tables)) >= _ROWS:
            break
    table = pa.concat_tables(tables)
    histories = [history_column(h, c) for h, columns in form.histories.items() for c in columns]
    wanted = ["user_id", "timestamp", *form.context, *histories]
    lacking = [name for name in wanted if name not in table.column_names]
    if lacking:
        raise UserError(
            f"{paths[0]} lacks {lacking}, which the model reads; name the --out of its own runs"
        )
    numbers = [number_beside_ids(name) for name in form.context]
    wanted += [name for name in numbers if name in table.column_names]
    rows: list[Row] = table.select(wanted).to_pylist()
    return rows


def _by_raw_id(path: Path, name: str) -> dict[int, int | str]:
    """The values of a column, or of its lists, by raw id."""
    if name not in pq.read_schema(path).names:  # of a history that the log delivers
        return {}
    column = pq.read_table(path, columns=[name])[name].combine_chunks()
    if pa.types.is_nested(column.type):
        column = column.flatten()
    column = column.unique().drop_null()
    return dict(zip(to_raw_ids(column).to_pylist(), column.to_pylist(), strict=True))

"""Requests made of events that a run ingested: what its callers would have asked.

Ingest keeps ids as raw ids. Those of the catalogue are written as the catalogue has them; a raw id
of another column is sent as it is, since it stands for itself.
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
from pipeline.samples.columns import history_column

_ROWS = 4096
"""Events that requests are made of, at most."""


def logged_requests(
    out: Path, data_root: Path, form: RequestForm, *, number: int, candidates: int
) -> list[ScoreRequest]:
    """Requests with the users, context and histories of the latest ingested day.

    Args:
        out: output directory of the runs.
        data_root: directory of items.parquet and users.parquet.
        form: of the model that is asked.
        number: of requests.
        candidates: of each, drawn from the catalogue.

    Raises:
        UserError: nothing was ingested, or what was lacks what the model reads.
    """
    rows = _latest_events(out, form)
    items = _written_ids(data_root / "items.parquet", "item_id")
    users = data_root / "users.parquet"
    names = _written_ids(users, "user_id") if users.exists() else {}
    shown = list(items.values())
    rng = np.random.default_rng(0)
    found = []
    for place in rng.integers(0, len(rows), number).tolist():
        row = rows[place]
        histories = {
            name: {column: row[history_column(name, column)] for column in columns}
            for name, columns in form.histories.items()
        }
        for columns in histories.values():
            columns["item_id"] = [items.get(item, shown[0]) for item in columns["item_id"]]
        found.append(
            ScoreRequest(
                user_id=names.get(row["user_id"], row["user_id"]),
                candidates=[shown[i] for i in rng.integers(0, len(shown), candidates).tolist()],
                timestamp=row["timestamp"],
                context={name: row[name] for name in form.context},
                histories=histories,
            )
        )
    return found


def _latest_events(out: Path, form: RequestForm) -> list[dict[str, Any]]:
    paths = sorted(out.glob("????-??-??/ingest/events/dt=*/*.parquet"), key=lambda p: p.parent.name)
    if not paths:
        raise UserError(f"--out {out} holds no ingested events to make requests of; name a run's")
    table = _first_rows([path for path in paths if path.parent == paths[-1].parent])
    histories = [history_column(h, c) for h, columns in form.histories.items() for c in columns]
    wanted = ["user_id", "timestamp", *form.context, *histories]
    lacking = [name for name in wanted if name not in table.column_names]
    if lacking:
        raise UserError(
            f"{paths[-1]} lacks {lacking}, which the model reads; name the --out of its own runs"
        )
    rows: list[dict[str, Any]] = table.select(wanted).to_pylist()
    return [{name: _without_missing(value) for name, value in row.items()} for row in rows]


def _first_rows(paths: list[Path]) -> pa.Table:
    found: list[pa.Table] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            found.append(pa.Table.from_batches([next(file.iter_batches(_ROWS))]))
        if sum(map(len, found)) >= _ROWS:
            break
    return pa.concat_tables(found)


def _without_missing(value: object) -> object:
    """The raw id of nothing as null."""
    if isinstance(value, list):
        return [None if one == MISSING_ID else one for one in value]
    return None if isinstance(value, int) and value == MISSING_ID else value


def _written_ids(path: Path, key: str) -> dict[int, int | str]:
    """By raw id."""
    column = pq.read_table(path, columns=[key])[key].combine_chunks()
    return dict(zip(to_raw_ids(column).to_pylist(), column.to_pylist(), strict=True))

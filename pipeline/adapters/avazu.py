"""Avazu's click log (train.csv or train.gz) in the data contract.

    day, timestamp   from `hour` (YYMMDDHH); all clicks of an hour bear its beginning
    request_id       the row's number
    user_id          device_id; where that is the placeholder, device_ip and device_model together
    item_id          C14, the creative; items.parquet lists those that occur
    hour, weekday    0 .. 23 and 0 (Monday) .. 6

All other columns stay as they are: hashes as strings, C1 and C14 .. C21 as integers.
"""

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from pipeline.adapters.importing import (
    ImportSummary,
    Progress,
    finished_import,
    header_of,
    importing,
    refuse_nulls,
    require_directory,
    source_receipt,
    stream_table,
    write_summary,
)
from pipeline.samples.dataset import TIMESTAMP, DayWriter

STRINGS = (
    "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category", "device_id",
    "device_ip", "device_model",
)  # fmt: skip
INTEGERS = (
    "C1", "banner_pos", "device_type", "device_conn_type", "C14", "C15", "C16", "C17", "C18", "C19",
    "C20", "C21",
)  # fmt: skip
NO_DEVICE = "a99f214a"
FILES = ("train.csv", "train.gz", "train.csv.gz", "train")
MS_PER_HOUR = 3_600_000
_EPOCH = date(1970, 1, 1)

EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("click", pa.int8()),
        ("hour", pa.int8()),
        ("weekday", pa.int8()),
        *((name, pa.string()) for name in STRINGS),
        *((name, pa.int32()) for name in INTEGERS),
    ]
)


def import_avazu(src: Path, out: Path, *, progress: Progress | None = None) -> ImportSummary:
    """Write Avazu's log to `out`, streamed; nothing happens if that was done before.

    Args:
        src: Folder with train.csv or train.gz.
        out: Directory to create.
        progress: Called with bytes read and all bytes.

    Raises:
        UserError: the source does not fit, or `out` is in use.
    """
    path = _source_file(src)
    receipt = source_receipt("avazu", [path])
    done = finished_import(out, receipt)
    if done is not None:
        return done
    with importing(out, receipt) as scratch:
        log = _EventLog(scratch)
        try:
            for batch, line in _batches(path, progress):
                log.write(batch, path, line)
        finally:
            log.close()
        if not log.writers:
            raise UserError(f"{path} has a header and no row; download it again")
        ids = np.sort(np.concatenate(log.items))
        pq.write_table(pa.table({"item_id": np.unique(ids)}), scratch / "items.parquet")
        days = sorted(log.writers)
        return write_summary(
            scratch,
            ImportSummary(
                events=log.num_rows,
                users=0,
                items=len(np.unique(ids)),
                days=len(days),
                first_day=_day_name(days[0]),
                last_day=_day_name(days[-1]),
                label_rates={"click": log.num_clicks / log.num_rows},
            ),
        )


class _EventLog:
    """One open file a day: the public samples of this log are not in order of time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writers: dict[int, DayWriter] = {}
        self.items: list[Int64Array] = []
        self.num_rows = 0
        self.num_clicks = 0

    def write(self, batch: pa.RecordBatch, path: Path, line: int) -> None:
        hours = _epoch_hours(batch.column("hour"), path, line)
        click = batch.column("click")
        if not pc.all(pc.is_in(click, value_set=pa.array([0, 1], pa.int8()))).as_py():
            raise UserError(f"{path}, lines from {line}: column 'click' must be 0 or 1; correct it")
        days = hours // 24
        columns: dict[str, Any] = {
            "request_id": pa.array(np.arange(self.num_rows, self.num_rows + batch.num_rows)),
            "user_id": _users(batch),
            "item_id": batch.column("C14").cast(pa.int64()),
            "timestamp": pa.array(hours * MS_PER_HOUR).cast(TIMESTAMP),
            "click": click,
            "hour": pa.array((hours % 24).astype(np.int8)),
            "weekday": pa.array(((days + 3) % 7).astype(np.int8)),  # 1970-01-01 was a Thursday
            **{name: batch.column(name) for name in (*STRINGS, *INTEGERS)},
        }
        self.items.append(np.unique(columns["item_id"].to_numpy()))
        self.num_rows += batch.num_rows
        self.num_clicks += int(pc.sum(click).as_py())
        for day in np.unique(days).tolist():
            if day not in self.writers:
                self.writers[day] = DayWriter(self.root, _day_name(day), EVENTS)
            mask = pa.array(days == day)
            self.writers[day].write({name: value.filter(mask) for name, value in columns.items()})

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def _source_file(src: Path) -> Path:
    require_directory(src)
    for name in FILES:
        if (src / name).is_file():
            return src / name
    raise UserError(
        f"--src {src} holds no Avazu log: none of {', '.join(FILES)} is there; name the folder of "
        "the download"
    )


def _batches(path: Path, progress: Progress | None) -> Iterator[tuple[pa.RecordBatch, int]]:
    types = {
        "click": pa.int8(),
        "hour": pa.int64(),
        **dict.fromkeys(STRINGS, pa.string()),
        **dict.fromkeys(INTEGERS, pa.int32()),
    }
    header = header_of(path)
    missing = [name for name in types if name not in header]
    if missing:
        raise UserError(f"{path}: its header lacks the columns {missing}; use the training file")
    size = path.stat().st_size
    line = 2
    for batch in stream_table(
        path,
        types,
        delimiter=",",
        header=None,
        progress=None if progress is None else lambda position: progress(position, size),
    ):
        refuse_nulls(path, batch, line)
        yield batch, line
        line += batch.num_rows


def _epoch_hours(hour: pa.Array, path: Path, line: int) -> Int64Array:
    """Hours since 1970 of YYMMDDHH."""
    values = hour.to_numpy()
    distinct, code = np.unique(values, return_inverse=True)
    hours = np.empty(len(distinct), np.int64)
    for index, value in enumerate(distinct.tolist()):
        text = f"{value:08d}"
        try:
            day = date(2000 + int(text[:2]), int(text[2:4]), int(text[4:6]))
            if not (0 <= int(text[6:]) < 24 and len(text) == 8):
                raise ValueError(text)
        except ValueError as error:
            at = line + int((values == value).argmax())
            raise UserError(
                f"{path}, line {at}: column 'hour' is {value} but must be YYMMDDHH; correct the "
                "line"
            ) from error
        hours[index] = (day - _EPOCH).days * 24 + int(text[6:])
    return hours[code]


def _users(batch: pa.RecordBatch) -> pa.Array:
    device = batch.column("device_id")
    address = pc.binary_join_element_wise(
        batch.column("device_ip"), batch.column("device_model"), "-"
    )
    return pc.if_else(pc.equal(device, NO_DEVICE), address, device)


def _day_name(epoch_day: int) -> str:
    return (_EPOCH + timedelta(days=epoch_day)).isoformat()

"""Criteo's display advertising log (train.txt, day_0.gz ...) in the data contract.

A line is a label, 13 integers and 26 hexadecimal categories, separated by tabs; empty is null. The
log names neither users nor items nor times, so the keys are ours:

    request_id, user_id   the row's number: every row is a request and a user of its own
    item_id               0 everywhere; items.parquet has that one row
    timestamp             rows in their order, spread evenly over `days` pseudo-days

Categories become integers (they are 32-bit hashes). Metrics by user and by item mean nothing here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
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
    count_lines,
    finished_import,
    importing,
    require_directory,
    source_receipt,
    stream_table,
    write_summary,
)
from pipeline.days import parse_day
from pipeline.samples.dataset import TIMESTAMP, DayWriter

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *INTEGERS, *CATEGORIES)
PATTERNS = ("train.txt", "train.txt.gz", "day_*", "*.tsv", "*.tsv.gz", "*.txt", "*.txt.gz")
HEX_DIGITS = 8
MS_PER_DAY = 86_400_000
_EPOCH = parse_day("1970-01-01", "epoch")

EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("click", pa.int8()),
        *((name, pa.int32()) for name in INTEGERS),
        *((name, pa.int64()) for name in CATEGORIES),
    ]
)


def import_criteo(
    src: Path,
    out: Path,
    *,
    days: int = 7,
    first_day: str = "2014-01-01",
    progress: Progress | None = None,
) -> ImportSummary:
    """Write Criteo's log to `out`, streamed; nothing happens if that was done before.

    Args:
        src: Folder with train.txt, or day_0 .. day_23, each plain or .gz.
        out: Directory to create.
        days: Pseudo-days the rows are spread over.
        first_day: Name of the first one.
        progress: Called with bytes read and all bytes; the rows are counted first.

    Raises:
        UserError: the source does not fit, or `out` is in use.
    """
    if days < 1:
        raise UserError(f"--days {days} must be at least 1")
    start = parse_day(first_day, "--first-day")
    files = _source_files(src)
    receipt = source_receipt("criteo", files, days=days, first_day=first_day)
    done = finished_import(out, receipt)
    if done is not None:
        return done
    meter = _Meter(files, progress)
    counts = [count_lines(path, meter.of(path)) for path in files]
    num_rows = sum(counts)
    if num_rows < days:
        raise UserError(f"--src {src} has {num_rows} rows, too few for --days {days}; use fewer")
    bounds = np.arange(days + 1) * num_rows // days
    names = [(start + timedelta(days=day)).isoformat() for day in range(days)]
    with importing(out, receipt) as scratch:
        with ExitStack() as stack:
            writers = [stack.enter_context(DayWriter(scratch, name, EVENTS)) for name in names]
            clicks = row = 0
            for path in files:
                line = 1
                for batch in _batches(path, meter):
                    columns = _columns(batch, path, line)
                    clicks += int(pc.sum(columns["click"]).as_py())
                    rows = np.arange(row, row + batch.num_rows)
                    keys = _keys(rows, bounds, (start - _EPOCH).days)
                    _split_by_day(writers, {**columns, **keys}, rows, bounds)
                    row += batch.num_rows
                    line += batch.num_rows
        pq.write_table(pa.table({"item_id": pa.array([0], pa.int64())}), scratch / "items.parquet")
        return write_summary(
            scratch,
            ImportSummary(
                events=num_rows,
                users=0,
                items=1,
                days=days,
                first_day=names[0],
                last_day=names[-1],
                label_rates={"click": clicks / num_rows},
            ),
        )


class _Meter:
    """Bytes read in two passes over all files."""

    def __init__(self, files: list[Path], progress: Progress | None) -> None:
        self._progress = progress
        self._sizes = {path: path.stat().st_size for path in files}
        self._before = 0

    def of(self, path: Path) -> Callable[[int], None]:
        """Reports positions in one file; the files read before count as done."""
        before = self._before
        self._before += self._sizes[path]

        def report(position: int) -> None:
            if self._progress is not None:
                self._progress(before + position, 2 * sum(self._sizes.values()))

        return report


def _source_files(src: Path) -> list[Path]:
    require_directory(src)
    for pattern in PATTERNS:
        files = sorted(
            (path for path in src.glob(pattern) if path.is_file()),
            key=lambda path: (len(path.name), path.name),  # day_2 before day_10
        )
        if files:
            return files
    raise UserError(
        f"--src {src} holds no Criteo log: none of {', '.join(PATTERNS)} is there; unpack the "
        "download and name its folder"
    )


def _batches(path: Path, meter: _Meter) -> Iterator[pa.RecordBatch]:
    types = {
        "label": pa.int8(),
        **dict.fromkeys(INTEGERS, pa.int32()),
        **dict.fromkeys(CATEGORIES, pa.string()),
    }
    return stream_table(path, types, delimiter="\t", header=COLUMNS, progress=meter.of(path))


def _columns(batch: pa.RecordBatch, path: Path, line: int) -> dict[str, Any]:
    label = batch.column("label")
    wrong = pc.invert(pc.is_in(label, value_set=pa.array([0, 1], pa.int8())))
    if pc.any(wrong).as_py():
        at = int(wrong.to_numpy(zero_copy_only=False).argmax())
        raise UserError(
            f"{path}, line {line + at}: the label is {label[at].as_py()!r} but must be 0 or 1; the "
            "test file has none: leave it out"
        )
    columns = {name: batch.column(name) for name in INTEGERS}
    for name in CATEGORIES:
        columns[name] = _from_hex(batch.column(name), f"{path}, lines from {line}, column {name}")
    return {"click": label, **columns}


def _from_hex(column: pa.Array, where: str) -> pa.Array:
    """Eight hexadecimal digits as an integer; null stays null."""
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    text = column.fill_null("0" * HEX_DIGITS)
    fits = pc.match_substring_regex(text, f"^[0-9a-fA-F]{{{HEX_DIGITS}}}$")
    if not pc.all(fits).as_py():
        value = text.filter(pc.invert(fits))[0].as_py()
        raise UserError(f"{where}: {value!r} is not {HEX_DIGITS} hexadecimal digits; correct it")
    chars = np.frombuffer(text.cast(pa.binary(HEX_DIGITS)).buffers()[1], np.uint8)
    digits = (chars & 15) + 9 * (chars >> 6)  # '0' is 0x30, 'a' 0x61, 'A' 0x41
    digits = digits.reshape(-1, HEX_DIGITS)[: len(text)].astype(np.int64)
    return pa.array(digits @ 16 ** np.arange(HEX_DIGITS - 1, -1, -1), mask=is_null)


def _keys(rows: Int64Array, bounds: Int64Array, first_epoch_day: int) -> dict[str, Any]:
    day = np.searchsorted(bounds, rows, side="right") - 1
    length = bounds[day + 1] - bounds[day]
    within = (rows - bounds[day]) * MS_PER_DAY // length
    time = (first_epoch_day + day) * MS_PER_DAY + within
    return {
        "request_id": pa.array(rows),
        "user_id": pa.array(rows),
        "item_id": pa.array(np.zeros(len(rows), np.int64)),
        "timestamp": pa.array(time).cast(TIMESTAMP),
    }


def _split_by_day(
    writers: list[DayWriter], columns: dict[str, Any], rows: Int64Array, bounds: Int64Array
) -> None:
    cuts = np.clip(bounds - rows[0], 0, len(rows))
    for day, writer in enumerate(writers):
        first, last = int(cuts[day]), int(cuts[day + 1])
        if last > first:
            writer.write({name: value[first:last] for name, value in columns.items()})

"""Writing a dataset of the data contract: aside first, visible only when it is whole.

ROOT/events/dt=YYYY-MM-DD/part-00000.parquet   one file a day, streamed
ROOT/items.parquet, ROOT/users.parquet
ROOT/<receipt>.json                            what made it, and from what
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pydantic import ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.days import PARTITION

TIMESTAMP = pa.timestamp("ms", tz="UTC")
ROW_GROUP_ROWS = 131_072

logger = logging.getLogger(__name__)


def is_written(root: Path, name: str, receipt: StrictConfig) -> bool:
    """True if `root` already holds the dataset of this receipt; False if `root` is free.

    Args:
        root: of the dataset.
        name: of the receipt's file.
        receipt: what makes it, and from what; a model with plain values.

    Raises:
        UserError: something else lies there.
    """
    path = root / name
    if path.is_file():
        found = _read(path, type(receipt))
        if found == receipt:
            return True
        other = "unreadable" if found is None else _difference(_plain(found), _plain(receipt))
        raise UserError(
            f"{root} already holds another dataset ({name}: {other}); choose another directory, or "
            "delete this one to write it anew"
        )
    if root.is_dir() and not any(root.iterdir()):
        return False
    if root.exists():
        raise UserError(
            f"{root} exists and was not written by this command (it has no {name}); choose another "
            "directory, or move this one away"
        )
    return False


@contextmanager
def writing_dataset(root: Path, name: str, receipt: StrictConfig) -> Iterator[Path | None]:
    """A scratch directory that becomes `root` when the block ends, and vanishes when it raises.

    One process at a time: another one waits, and gets None if the dataset is there by then.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.parent / f".{root.name}.lock"
    with _waiting_for(FileLock(path), root):
        try:
            if is_written(root, name, receipt):
                yield None
            else:
                with _writing_alone(root, name, receipt) as scratch:
                    yield scratch
        finally:
            path.unlink(missing_ok=True)  # while it is held: who waits for this file tries anew


def _waiting_for(lock: FileLock, root: Path) -> AbstractContextManager[object]:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process writes %s; waiting for it", root)
        return lock.acquire()


@contextmanager
def _writing_alone(root: Path, name: str, receipt: StrictConfig) -> Iterator[Path]:
    scratch = root.parent / f".{root.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        (scratch / name).write_text(receipt.model_dump_json(indent=2))
        if root.is_dir():
            root.rmdir()  # empty: `is_written` has seen to it
        scratch.rename(root)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


class DayWriter:
    """Writes the events of one day in row groups of about `ROW_GROUP_ROWS`."""

    def __init__(self, root: Path, day: str, schema: pa.Schema) -> None:
        folder = root / "events" / f"{PARTITION}{day}"
        folder.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._writer = pq.ParquetWriter(folder / "part-00000.parquet", schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self.num_rows = 0

    def write(self, columns: dict[str, Any]) -> None:
        """Append rows: Arrow or numpy columns by name."""
        arrays = [
            value
            if isinstance(value, (pa.Array, pa.ChunkedArray))
            else pa.array(value, self._schema.field(name).type)
            for name, value in ((name, columns[name]) for name in self._schema.names)
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._pending.append(table)
        self.num_rows += table.num_rows
        if sum(part.num_rows for part in self._pending) >= ROW_GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            table = pa.concat_tables(self._pending)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._pending = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read(path: Path, kind: type[StrictConfig]) -> StrictConfig | None:
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError:
        return None


def _plain(receipt: StrictConfig) -> dict[str, Any]:
    return receipt.model_dump(mode="json")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    for key in sorted({*found, *wanted}):
        here, there = found.get(key), wanted.get(key)
        if isinstance(here, dict) and isinstance(there, dict) and here != there:
            return f"{key}.{_difference(here, there)}"
        if here != there:
            return f"{key} is {here!r}, asked for is {there!r}"
    return "same"

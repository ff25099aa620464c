"""Writing a data set in the contract's layout: all of it or nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.errors import UserError

MADE_BY = "made_by.json"
ROWS_PER_GROUP = 65_536


@contextmanager
def new_dataset(root: Path, made_by: dict[str, Any]) -> Iterator[Path | None]:
    """A directory to write a data set into; it becomes `root` when the block ends well.

    Args:
        root: where the data set shall be.
        made_by: JSON data that says which command with which options writes it.

    Yields:
        The directory to write into, or None if the same command wrote `root` before.

    Raises:
        UserError: `root` exists and is something else.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _refuse_other(root, made_by)
        yield None
        return
    partial = root.parent / f".{root.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / MADE_BY).write_text(json.dumps(made_by, indent=2, sort_keys=True))
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_other(root: Path, made_by: dict[str, Any]) -> None:
    path = root / MADE_BY if root.is_dir() else root
    if not path.exists() or path == root:
        raise UserError(f"{root} exists and no braid command made it; choose another directory")
    before = json.loads(path.read_text())
    changed = sorted(k for k in made_by.keys() | before.keys() if made_by.get(k) != before.get(k))
    if changed:
        was = {k: before.get(k) for k in changed}
        now = {k: made_by.get(k) for k in changed}
        raise UserError(
            f"{root} was made with other settings ({was}, now {now}); remove it or choose another "
            "directory"
        )


class EventWriter:
    """Writes events day by day into events/dt=*/part-00000.parquet; one day is open at a time."""

    def __init__(self, root: Path, schema: pa.Schema) -> None:
        self.root, self.schema = root, schema
        self._day = ""
        self._writer: pq.ParquetWriter | None = None

    def write(self, day: str, events: pa.Table) -> None:
        """Append the events of `day`; a day once left must not come again."""
        if day != self._day:
            self.close()
            folder = self.root / "events" / f"dt={day}"
            folder.mkdir(parents=True)
            self._day = day
            self._writer = pq.ParquetWriter(
                folder / "part-00000.parquet", self.schema, compression="zstd"
            )
        assert self._writer is not None
        self._writer.write_table(events.cast(self.schema), row_group_size=ROWS_PER_GROUP)

    def close(self) -> None:
        """Finish the open file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

"""The event files of a day: those with the same bytes are the same, whenever they were written.

A log that is copied, restored or moved gets new times and is the log that it was. A correction may
leave a file as large as before, with the row counts and statistics of before in its footer. So
bytes decide; sizes and times say quickly that nothing has happened, or that something has.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import file_sha256, write_durably
from pipeline.days import day_files, vanished

KNOWN_DAYS = ".event_files.json"
"""In an output directory: the files of days as they were read last."""
_THREADS = 8
"""Files that are read at a time: shared storage answers several as fast as one."""
_SAID_BYTES = 1 << 30
"""Of a day whose reading is worth a line."""


class DayFiles(StrictConfig):
    """The event files of a day as they were found."""

    num_bytes: int
    seen: str
    """Fingerprint of names, sizes and times."""
    content: str
    """Fingerprint of names and bytes."""

    @classmethod
    def of(cls, root: Path, day: str) -> "DayFiles":
        """Those of now; reads all of them.

        Raises:
            UserError: one went meanwhile, or cannot be read.
        """
        paths = day_files(root, [day])
        # Before the bytes: what is written meanwhile is another file.
        num_bytes, seen = _look_at(paths)
        return cls(num_bytes=num_bytes, seen=seen, content=_content(paths))


_Days = TypeAdapter(dict[str, DayFiles])


class KnownDays:
    """The event files of days, read where names, sizes and times are not those of the last time.

    Kept in the output directory, so that a log that was copied is read again once, not every night.
    """

    def __init__(self, out: Path, root: Path, say: Callable[[str], None]) -> None:
        """What is known below one output directory.

        Args:
            out: output directory.
            root: data root with the event log.
            say: shows a line before much is read.
        """
        self._file = out / KNOWN_DAYS
        self.root = root
        self._say = say
        self._days: dict[str, DayFiles] = {}
        with suppress(OSError, ValidationError):
            self._days = _Days.validate_json(self._file.read_bytes())

    def files(self, day: str) -> DayFiles:
        """Those of now.

        Raises:
            UserError: one went meanwhile, or cannot be read.
        """
        paths = day_files(self.root, [day])
        num_bytes, seen = _look_at(paths)
        known = self._days.get(day)
        if known is not None and known.seen == seen:
            return known
        if num_bytes >= _SAID_BYTES:
            self._say(
                f"  reading {num_bytes / 2**30:,.1f} GiB of events of {day}, to know them again"
            )
        # Looked at before: what is written meanwhile is another file.
        found = self._days[day] = DayFiles(num_bytes=num_bytes, seen=seen, content=_content(paths))
        if self._file.parent.is_dir():
            with suppress(OSError):  # they are read again then
                write_durably(self._file, _Days.dump_json(self._days).decode())
        return found

    def are(self, day: str, files: DayFiles) -> bool:
        """Whether a day still has these; reads them where nothing but their times is others.

        Raises:
            UserError: one went meanwhile, or cannot be read.
        """
        num_bytes, seen = _look_at(day_files(self.root, [day]))
        if num_bytes != files.num_bytes:
            return False
        return seen == files.seen or self.files(day).content == files.content


def _look_at(paths: Sequence[Path]) -> tuple[int, str]:
    """Bytes of all files, and a fingerprint of names, sizes and times."""
    num_bytes, digest = 0, hashlib.sha256()
    for path in paths:
        try:
            found = path.stat()
        except FileNotFoundError as error:
            raise vanished(path) from error
        num_bytes += found.st_size
        digest.update(f"{path.name}|{found.st_size}|{found.st_mtime_ns}\n".encode())
    return num_bytes, digest.hexdigest()[:16]


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, checksum in zip(paths, pool.map(_sha256, paths), strict=True):
            digest.update(f"{path.name}|{checksum}\n".encode())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError as error:
        raise vanished(path) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it a file that this user may read, or "
            "move it away"
        ) from error

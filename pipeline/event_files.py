"""The event files of a day: those with the same bytes are the same, whenever they were written.

A log that is copied, restored or moved gets new times and is the log that it was. A correction may
leave a file as large as before, with the row counts and statistics of before in its footer. So
bytes decide; sizes and times say quickly that nothing has happened, or that something has.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from os import stat_result
from pathlib import Path
from typing import Self

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import file_sha256
from pipeline.days import day_files, fingerprint, vanished

_THREADS = 8
"""Files that are read at a time: shared storage answers several as fast as one."""


class DayFiles(StrictConfig):
    """The event files of a day as they were found."""

    num_bytes: int
    seen: str
    """Fingerprint of names, sizes and times."""
    content: str
    """Fingerprint of names and bytes."""

    @classmethod
    def of(cls, root: Path, day: str) -> Self:
        """Those of now; reads all of them.

        Raises:
            UserError: one went meanwhile, or cannot be read.
        """
        paths = day_files(root, [day])
        seen = fingerprint(paths)  # before the bytes: what is written meanwhile is another file
        return cls(num_bytes=_num_bytes(paths), seen=seen, content=_content(paths))

    def are_those_of(self, root: Path, day: str) -> bool:
        """Whether a day has the same files; reads them where nothing but their times is others.

        Raises:
            UserError: one went meanwhile, or cannot be read.
        """
        paths = day_files(root, [day])
        if _num_bytes(paths) != self.num_bytes:
            return False
        return fingerprint(paths) == self.seen or _content(paths) == self.content


def _num_bytes(paths: Sequence[Path]) -> int:
    return sum(_stat(path).st_size for path in paths)


def _stat(path: Path) -> stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise vanished(path) from error


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        for path, checksum in zip(paths, pool.map(_sha256_once, paths), strict=True):
            digest.update(f"{path.name}|{checksum}\n".encode())
    return digest.hexdigest()[:16]


def _sha256_once(path: Path) -> str:
    """A run asks several times what the files of a day are."""
    found = _stat(path)
    return _sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    del size, modified_ns  # tell a file that was written anew from what it was
    try:
        return file_sha256(path)
    except FileNotFoundError as error:
        raise vanished(path) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it a file that this user may read, or "
            "move it away"
        ) from error

"""Files: checksums, second names, and text that is on disk before anybody relies on it."""

import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from embedding.errors import UserError

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
"""What file systems say that have none, or no more."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; memory holds a block of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Replace a file in one move, on disk before the call returns; a failure leaves nothing."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def require_writable(path: Path) -> None:
    """Refuse a target of `write_durably` while nothing has been computed for it yet.

    Raises:
        UserError: its directory is missing or takes no file, or something else has its name.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no directory {path.parent}; create it")
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "no ordinary file"
        raise UserError(f"{path} cannot be written: it is {what}; give the name of a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give another name or directory"
        ) from error


def sync(path: Path) -> None:
    """Return once a file's content, or the names in a directory, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for a file that never changes; a copy where there are no hard links.

    `target` does not exist.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """All files of a directory, visible in one move and on disk before the call returns.

    `target` does not exist.
    """
    partial = target.with_name(f".{target.name}.linked")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    for path in (partial, *partial.rglob("*")):
        sync(path)
    partial.rename(target)
    sync(target.parent)

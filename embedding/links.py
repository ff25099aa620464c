"""A second name for files that never change; a copy where the file system has no hard links."""

import errno
import os
import shutil
from pathlib import Path

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
"""What file systems say that have none, or no more."""


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """One file; `target` does not exist."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """All files of a directory, visible in one move; `target` does not exist."""
    partial = target.with_name(f".{target.name}.linked")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    partial.rename(target)

"""A second name for files that never change; a copy where the file system has no hard links."""

import os
import shutil
from pathlib import Path


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """One file; `target` does not exist."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """All files of a directory, visible in one move; `target` does not exist."""
    partial = target.with_name(f".{target.name}.linked")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link_or_copy)
    partial.rename(target)

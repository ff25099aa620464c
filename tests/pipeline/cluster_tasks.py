"""Tasks and an actor that Ray workers of tests import."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from embedding.errors import UserError


def times(task: int, factor: int) -> int:
    return task * factor


def parts(task: int, directory: Path) -> Iterator[tuple[int, int]]:
    """Three results; the process of task 1 dies after its second one, the first time."""
    for part in range(3):
        if (task, part) == (1, 2) and not (directory / "died").exists():
            (directory / "died").touch()
            time.sleep(0.5)  # what was yielded has arrived
            os._exit(1)
        yield task, part


def fault(task: int, shared: str) -> int:
    if task == 2:
        raise UserError(f"{shared} is not a sound file")
    return task


def crash(task: int, directory: Path) -> int:
    with (directory / "crashes").open("a") as log:
        log.write("x")
    os._exit(1)


def sleep(task: int, seconds: float) -> int:
    time.sleep(seconds)
    return task


class Holder:
    """A process of another job."""

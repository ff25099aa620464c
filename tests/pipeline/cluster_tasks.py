"""Tasks and an actor that Ray workers of tests import."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from embedding.errors import UserError
from pipeline.artifacts import StageFacts
from pipeline.stages import StageOutput


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


def squares(directory: Path) -> Callable[[int], int]:
    """What does a piece; notes each load. Piece 3 is a fault, and at 5 the process dies once."""
    (directory / f"load-{os.getpid()}").touch()

    def square(piece: int) -> int:
        if piece == 3:
            raise UserError("piece 3 is not sound")
        if piece == 5 and not (directory / "died").exists():
            (directory / "died").touch()
            os._exit(1)
        return piece * piece

    return square


class Holder:
    """A process of another job."""


class WithActor:
    """A process of a study whose trials need an actor of one CPU each."""

    def warm_up(self, use_gpu: bool, has_content: bool) -> None:
        pass

    def run(self, trial: str) -> StageOutput:
        actor = ray.remote(Holder).options(num_cpus=1).remote()
        ray.get(actor.__ray_ready__.remote(), timeout=20)
        ray.kill(actor)
        return StageOutput(1, 1, StageFacts())

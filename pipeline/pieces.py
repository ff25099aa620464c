"""Work in pieces on Ray actors, which are gone when it is done.

What an actor loads with its first piece serves all of its pieces. A process that Ray keeps for
further tasks would go on holding memory of a GPU, which the stage behind trains on.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from embedding.errors import UserError
from embedding.memory import WORKER_ENVIRONMENT
from pipeline.cluster import Bundle

Result = TypeVar("Result")
Piece = TypeVar("Piece")

_RETRIES = 2
"""So often an actor that died, with its node perhaps, is started again and gets its piece again."""
_SILENT_S = 60.0
"""Without a result for so long, a line says so."""

logger = logging.getLogger(__name__)


class PieceActor:
    """Does piece after piece."""

    def __init__(self, load: Callable[[], Callable[[Any], Any]]) -> None:
        self._load = load
        self._work: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Answers once the process runs."""

    def work(self, piece: Any) -> Any:
        """What comes of a piece; a fault of the user travels as data, and stays whole."""
        try:
            if self._work is None:
                self._work = self._load()
            return self._work(piece)
        except UserError as error:
            return error


def stream_pieces(
    load: Callable[[], Callable[[Piece], Result]],
    pieces: Iterable[Piece],
    *,
    asked: Bundle,
    num_actors: int,
) -> Iterator[tuple[int, Result]]:
    """Do every piece on one of the actors, one piece an actor at a time.

    Args:
        load: importable; called once an actor, it returns what does a piece.
        pieces: taken from it as actors become free.
        asked: CPUs and GPUs of an actor.
        num_actors: no more than there are pieces. Where others hold their CPUs, those that run do
            the work of the rest.

    Yields:
        Number and result of each piece, in the order in which they are done.

    Raises:
        UserError: an actor raised it.
        ray.exceptions.RayError: an actor raised something else, or died every time.
    """
    actor_class = ray.remote(PieceActor).options(
        num_cpus=asked["CPU"],
        num_gpus=asked.get("GPU", 0.0),
        max_restarts=_RETRIES,
        max_task_retries=_RETRIES,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    todo = enumerate(pieces)
    following = next(todo, None)
    actors = [actor_class.remote(load) for _ in range(num_actors if following else 0)]
    # An actor gets a piece once it runs.
    starting = {actor.ready.remote(): actor for actor in actors}
    running: dict[Any, tuple[int, Any]] = {}
    said = time.monotonic()
    try:
        while running or following is not None:
            ready, _ = ray.wait([*running, *starting], num_returns=1, timeout=_SILENT_S)
            if not ready:
                free = ray.available_resources().get("CPU", 0.0)
                logger.warning(
                    "%d pieces at work, %d actors waiting for a CPU (%g free): no result for "
                    "%.0f s",
                    len(running),
                    len(starting),
                    free,
                    time.monotonic() - said,
                )
                continue
            said = time.monotonic()
            (finished,) = ready
            result = ray.get(finished)
            if isinstance(result, UserError):
                raise result
            if finished in starting:
                actor, done = starting.pop(finished), None
            else:
                at, actor = running.pop(finished)
                done = (at, result)
            if following is not None:
                running[actor.work.remote(following[1])] = (following[0], actor)
                following = next(todo, None)
            if done is not None:
                yield done
    finally:
        for actor in actors:
            ray.kill(actor)

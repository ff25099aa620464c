"""Requests that wait for one another, and are scored together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deploy.serving.event_rows import EventRows
from deploy.serving.live_model import Loaded
from deploy.serving.scorer import Scores

MAX_REQUESTS = 32
MAX_ROWS = 16_384
"""Candidates that are scored at once: bounds the memory of a batch."""


@dataclass(frozen=True)
class Asked:
    """A request that waits for its batch."""

    loaded: Loaded
    """The model that its rows suit: there may be a newer one when the batch begins."""
    rows: EventRows


Outcome = Scores | Exception
ScoreBatch = Callable[[Sequence[Asked]], list[Outcome]]


class Batcher:
    """Scores what waits, one batch after the other in a thread of its own.

    What comes while a batch is scored makes up the next one. So an idle service adds no delay, and
    the batches of a busy one grow with its load.
    """

    def __init__(self, score: ScoreBatch) -> None:
        """`score`: gives an outcome for each of at most `MAX_REQUESTS`."""
        self._score = score
        self._waiting: list[tuple[Asked, asyncio.Future[Scores]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")

    async def scores(self, asked: Asked) -> Scores:
        """Wait for the scores of a request, or for what was wrong with it."""
        future: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = (
                    self._waiting[:MAX_REQUESTS],
                    self._waiting[MAX_REQUESTS:],
                )
                batch = [(one, future) for one, future in batch if not future.done()]
                if not batch:
                    continue
                asked = [one for one, _ in batch]
                outcomes = await loop.run_in_executor(self._thread, self._outcomes, asked)
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():  # its caller went away
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._draining = None

    def _outcomes(self, asked: Sequence[Asked]) -> list[Outcome]:
        try:
            return self._score(asked)
        except Exception as error:  # noqa: BLE001 # nobody waits for an answer for ever
            return [error] * len(asked)


def score_together(asked: Sequence[Asked]) -> list[Outcome]:
    """Outcome of each, in their order; what is wrong with one request does not end the others."""
    found: list[Outcome] = []
    for group in grouped(asked):
        try:
            found += group[0].loaded.scorer.score([one.rows for one in group])
        except Exception as error:  # noqa: BLE001 # it is raised where its request is answered
            alone = len(group) == 1
            found += [error] if alone else [score_together([one])[0] for one in group]
    return found


def grouped(asked: Sequence[Asked], max_rows: int = MAX_ROWS) -> list[list[Asked]]:
    """Neighbours that one model scores at once: `max_rows` rows, unless a single one has more."""
    found: list[list[Asked]] = []
    rows = 0
    for one in asked:
        fits = rows + len(one.rows) <= max_rows
        if found and fits and found[-1][0].loaded is one.loaded:
            found[-1].append(one)
            rows += len(one.rows)
        else:
            found.append([one])
            rows = len(one.rows)
    return found

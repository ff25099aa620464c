"""Requests that wait for one another, and are scored together."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deploy.serving.event_rows import EventRows
from deploy.serving.live_model import Loaded
from deploy.serving.scorer import Scores

MAX_REQUESTS = 32
MAX_ROWS = 16_384
"""Candidates that are scored at once: bounds the memory of a batch."""
MAX_FAILED = 10
"""Batches in a row without a score: one request that breaks the model is asked again, but rarely so
often with none that is sound between."""
MAX_BATCH_S = 120.0
"""Twice the time after which no caller waits for an answer."""


@dataclass(frozen=True)
class Asked:
    """A request that waits for its batch."""

    loaded: Loaded
    """The model that its rows suit: there may be a newer one when the batch begins."""
    rows: EventRows


Outcome = Scores | Exception
ScoreBatch = Callable[[Sequence[Asked]], list[Outcome]]


class BatchHealth:
    """Whether batches come to an end, and with scores: a replica that scores nothing is no use."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s: float | None = None
        self._num_failed = 0

    def begun(self) -> None:
        """A batch is scored from now on."""
        self._begun_s = self._clock()

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """It has outcomes; it failed where none of them are scores."""
        self._begun_s = None
        failed = all(isinstance(one, Exception) for one in outcomes)
        self._num_failed = self._num_failed + 1 if failed else 0

    @property
    def fault(self) -> str | None:
        """Why the process is to be started anew; None where it is not."""
        if self._num_failed >= MAX_FAILED:
            return f"the last {self._num_failed} batches failed"
        lasted_s = 0.0 if self._begun_s is None else self._clock() - self._begun_s
        return f"a batch has run for {lasted_s:.0f} s" if lasted_s > MAX_BATCH_S else None


class Batcher:
    """Scores what waits, one batch after the other in a thread of its own.

    What comes while a batch is scored makes up the next one. So an idle service adds no delay, and
    the batches of a busy one grow with its load.
    """

    def __init__(self, score: ScoreBatch) -> None:
        """`score`: gives an outcome for each of a `first_group`."""
        self._score = score
        self._waiting: list[tuple[Asked, asyncio.Future[Scores]]] = []
        self._draining: asyncio.Task[None] | None = None
        self.health = BatchHealth()
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
                batch = self._next_batch()
                if not batch:  # all their callers went away
                    continue
                asked = [one for one, _ in batch]
                self.health.begun()
                outcomes = await loop.run_in_executor(self._thread, self._outcomes, asked)
                self.health.ended(outcomes)
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():  # its caller went away
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._draining = None

    def _next_batch(self) -> "list[tuple[Asked, asyncio.Future[Scores]]]":
        """The first of those that wait, as far as one model scores them at once."""
        self._waiting = [(one, future) for one, future in self._waiting if not future.done()]
        size = first_group([one for one, _ in self._waiting])
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        return batch

    def _outcomes(self, asked: Sequence[Asked]) -> list[Outcome]:
        try:
            return self._score(asked)
        except Exception as error:  # noqa: BLE001 # nobody waits for an answer for ever
            return [error] * len(asked)


def score_together(asked: Sequence[Asked]) -> list[Outcome]:
    """Outcome of each, all of one model; what is wrong with one does not end the others."""
    if not asked:
        return []
    try:
        return list(asked[0].loaded.scorer.score([one.rows for one in asked]))
    except Exception as error:  # noqa: BLE001 # it is raised where its request is answered
        if len(asked) == 1:
            return [error]
        return [outcome for one in asked for outcome in score_together([one])]


def first_group(asked: Sequence[Asked], max_rows: int = MAX_ROWS) -> int:
    """How many of the first requests are scored at once: of one model, and bounded in number.

    And in rows, unless the first alone has more.
    """
    rows = 0
    for place, one in enumerate(asked[:MAX_REQUESTS]):
        rows += len(one.rows)
        if place and (rows > max_rows or one.loaded is not asked[0].loaded):
            return place
    return min(len(asked), MAX_REQUESTS)

"""Requests against a running service, and how long their answers took.

Closed loop: `concurrency` callers, each asking again once it has its answer: what the service can
do. Open loop: requests leave at a fixed rate, whatever became of those before, and a request's time
counts from when it should have left: what callers see at that rate.

A refusal comes sooner than scores, so failures make percentiles look better than the service is:
their share stands beside them.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import aiohttp
import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt

from embedding.config import StrictConfig
from embedding.errors import UserError

_TIMEOUT_S = 60
_WARM_UP = 20
"""Requests that are not counted: the first ones load what the others find."""


class LoadPlan(StrictConfig):
    """How a service is asked."""

    seconds: float = 20
    concurrency: int = 8
    """Callers of a closed loop; an open one has as many as are under way."""
    rate: float | None = None
    """Requests a second of an open loop; None: a closed one."""
    candidates: int = 200
    """Of a request."""


class LoadFigures(StrictConfig):
    """What a service did."""

    schema_version: Literal[1] = 1
    plan: LoadPlan
    requests: NonNegativeInt
    seconds: NonNegativeFloat
    requests_per_s: NonNegativeFloat
    """Answered with status 200."""
    candidates_per_s: NonNegativeFloat
    failed_share: NonNegativeFloat
    """Of the requests: those with another status, or without an answer."""
    p50_ms: NonNegativeFloat
    """Of all requests, as the others: a failure took as long as its caller waited for it."""
    p95_ms: NonNegativeFloat
    p99_ms: NonNegativeFloat
    max_ms: NonNegativeFloat
    statuses: dict[str, int]
    models: dict[str, int]
    """Answers by the date of the model that gave them."""


class _Answers:
    """What came back so far."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        """Of all, until their answer or their failure."""
        self.num_scored = 0
        self.statuses = Counter[str]()
        self.models = Counter[str]()
        self.example: str | None = None
        """A refusal, as it came."""


async def ask_all(url: str, bodies: Sequence[bytes], plan: LoadPlan) -> LoadFigures:
    """Ask a service for some seconds.

    Args:
        url: in front of /score.
        bodies: requests, asked in turn.
        plan: how.

    Raises:
        UserError: nothing listens there, or it refuses what it is asked.
        RuntimeError: it stopped answering.
    """
    # Requests of an open loop that waited here for a connection would leave at the service's rate.
    limit = aiohttp.TCPConnector(limit=plan.concurrency if plan.rate is None else 0)
    wait = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=limit, timeout=wait) as session:
        warm = _Caller(session, url, bodies)
        for number in range(min(_WARM_UP, len(bodies))):
            await warm.ask(number, time.perf_counter())
        if not warm.answers.num_scored:
            raise UserError(
                f"{url}/score does not answer requests of the log: {dict(warm.answers.statuses)} "
                f"{warm.answers.example or ''}"
            )
        caller = _Caller(session, url, bodies)
        started = time.perf_counter()
        if plan.rate is None:
            await _closed_loop(caller, plan)
        else:
            await _open_loop(caller, plan, plan.rate)
        seconds = time.perf_counter() - started
    found = caller.answers
    if not found.num_scored:
        raise RuntimeError(f"{url}/score answered none of the requests: {dict(found.statuses)}")
    return _figures(found, plan, seconds)


async def _closed_loop(caller: "_Caller", plan: LoadPlan) -> None:
    until = time.perf_counter() + plan.seconds

    async def ask_again(first: int) -> None:
        number = first
        while time.perf_counter() < until:
            await caller.ask(number, time.perf_counter())
            number += plan.concurrency

    await asyncio.gather(*(ask_again(first) for first in range(plan.concurrency)))


async def _open_loop(caller: "_Caller", plan: LoadPlan, rate: float) -> None:
    started = time.perf_counter()
    under_way = []
    for number in range(int(plan.seconds * rate)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        under_way.append(asyncio.create_task(caller.ask(number, due)))
    await asyncio.gather(*under_way)


class _Caller:
    """Asks, and keeps what came back."""

    def __init__(self, session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes]) -> None:
        self._session, self._url, self._bodies = session, f"{url}/score", bodies
        self.answers = _Answers()

    async def ask(self, number: int, due: float) -> None:
        """Send a request; its time counts from when it was due."""
        body, found = self._bodies[number % len(self._bodies)], self.answers
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(self._url, data=body, headers=headers) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            found.times_s.append(time.perf_counter() - due)
            found.statuses[type(error).__name__] += 1
            return
        found.times_s.append(time.perf_counter() - due)
        found.statuses[str(answer.status)] += 1
        if answer.status != 200:  # noqa: PLR2004 # HTTP's own
            found.example = text
            return
        found.num_scored += 1
        found.models[str(_model_of(text)["date"])] += 1


def _model_of(text: str) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(text)["model"]
    return model


def _figures(found: _Answers, plan: LoadPlan, seconds: float) -> LoadFigures:
    times_ms = 1000 * np.array(found.times_s)
    p50, p95, p99 = np.percentile(times_ms, [50, 95, 99]).tolist()
    return LoadFigures(
        plan=plan,
        requests=sum(found.statuses.values()),
        seconds=seconds,
        requests_per_s=found.num_scored / seconds,
        candidates_per_s=plan.candidates * found.num_scored / seconds,
        failed_share=1 - found.num_scored / len(found.times_s),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(times_ms.max()),
        statuses=dict(found.statuses),
        models=dict(found.models),
    )

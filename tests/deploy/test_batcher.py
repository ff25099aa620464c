"""What waits while a batch is scored makes up the next one."""

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from deploy.serving.batches import (
    MAX_BATCH_S,
    MAX_FAILED,
    MAX_REQUESTS,
    Asked,
    Batcher,
    BatchHealth,
    Outcome,
    first_group,
)
from deploy.serving.scorer import Scores


def scores_of(number: int) -> Scores:
    return Scores(torch.tensor([[float(number)]]), 0, False, 0)


def asked(number: int, num_rows: int = 1, model: str = "") -> Asked:
    """A request with a number, of some candidates, for a model."""
    return cast("Asked", SimpleNamespace(number=number, rows=[None] * num_rows, loaded=model))


def numbers(batch: Sequence[Asked]) -> list[int]:
    return [cast("Any", one).number for one in batch]


class Scorer:
    """Scores a batch once it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, batch: Sequence[Asked]) -> list[Outcome]:
        self.batches.append(numbers(batch))
        self.begun.release()
        assert self.go.acquire(timeout=30)
        return [
            ZeroDivisionError() if number == 13 else scores_of(number) for number in numbers(batch)
        ]


async def begun(scorer: Scorer) -> None:
    assert await asyncio.to_thread(scorer.begun.acquire, timeout=30)


def test_batches_grow_with_what_waits_and_answers_are_those_of_their_requests() -> None:
    async def run() -> list[Any]:
        scorer = Scorer()
        batcher = Batcher(scorer)
        tasks = [asyncio.create_task(batcher.scores(asked(0)))]
        await begun(scorer)
        tasks += [asyncio.create_task(batcher.scores(asked(i))) for i in range(1, 40)]
        await asyncio.sleep(0)
        for _ in range(3):
            scorer.go.release()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert scorer.batches == [[0], [*range(1, MAX_REQUESTS + 1)], [*range(33, 40)]]
        scorer.go.release()
        last = await batcher.scores(asked(40))  # one that comes to an idle service
        assert last.probs_BT.item() == 40
        return found

    found = asyncio.run(run())

    assert isinstance(found[13], ZeroDivisionError)
    values = [one.probs_BT.item() for i, one in enumerate(found) if i != 13]
    assert values == [i for i in range(40) if i != 13]


def test_a_caller_that_went_away_is_not_scored_and_holds_nobody_up() -> None:
    async def run() -> list[list[int]]:
        scorer = Scorer()
        batcher = Batcher(scorer)
        first = asyncio.create_task(batcher.scores(asked(0)))
        await begun(scorer)
        gone, third = (asyncio.create_task(batcher.scores(asked(i))) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        scorer.go.release()
        scorer.go.release()
        assert (await first).probs_BT.item() == 0
        assert (await third).probs_BT.item() == 2
        with pytest.raises(asyncio.CancelledError):
            await gone
        return scorer.batches

    assert asyncio.run(run()) == [[0], [2]]


def test_a_batch_that_nobody_waits_for_is_not_scored() -> None:
    async def run() -> list[list[int]]:
        scorer = Scorer()
        batcher = Batcher(scorer)
        first = asyncio.create_task(batcher.scores(asked(0)))
        await begun(scorer)
        gone = asyncio.create_task(batcher.scores(asked(1)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        scorer.go.release()
        scorer.go.release()
        await first
        await asyncio.sleep(0.05)
        return scorer.batches

    assert asyncio.run(run()) == [[0]]


def test_a_replica_whose_batches_all_fail_or_hang_is_not_healthy() -> None:
    now = 0.0
    health = BatchHealth(lambda: now)
    bad: list[Outcome] = [MemoryError(), MemoryError()]

    def failed(times: int) -> None:
        for _ in range(times):
            health.begun()
            health.ended(bad)

    failed(MAX_FAILED - 1)
    health.begun()
    health.ended([MemoryError(), scores_of(1)])
    failed(MAX_FAILED - 1)
    assert health.fault is None, "one that scored something begins the count anew"
    failed(1)
    assert health.fault == f"the last {MAX_FAILED} batches failed"
    health.begun()
    health.ended([scores_of(1)])
    assert health.fault is None
    health.begun()
    now = MAX_BATCH_S + 1
    assert health.fault == "a batch has run for 121 s"
    health.ended(bad)
    assert health.fault is None


def test_a_batcher_knows_its_health() -> None:
    def broken(_: Sequence[Asked]) -> list[Outcome]:
        raise MemoryError

    async def run() -> str | None:
        batcher = Batcher(broken)
        for _ in range(MAX_FAILED):
            with pytest.raises(MemoryError):
                await batcher.scores(asked(0))
        return batcher.health.fault

    assert asyncio.run(run()) is not None


def test_a_caller_that_goes_while_its_batch_is_scored_holds_nobody_up() -> None:
    async def run() -> None:
        scorer = Scorer()
        batcher = Batcher(scorer)
        gone, other = (asyncio.create_task(batcher.scores(asked(i))) for i in range(2))
        await begun(scorer)
        gone.cancel()
        scorer.go.release()
        assert (await other).probs_BT.item() == 1

    asyncio.run(run())


def test_a_batch_is_of_one_model_and_bounded_in_rows() -> None:
    three = asked(0, num_rows=3, model="new")
    one, other = asked(1, model="new"), asked(2, model="old")

    assert first_group([three, three, three], max_rows=6) == 2
    assert first_group([three, one, other, one], max_rows=6) == 2
    assert first_group([other, three], max_rows=6) == 1
    assert first_group([three], max_rows=2) == 1
    assert first_group([one] * 100, max_rows=1000) == MAX_REQUESTS
    assert first_group([]) == 0


def test_a_batch_that_breaks_as_a_whole_is_answered() -> None:
    def broken(_: Sequence[Asked]) -> list[Outcome]:
        raise MemoryError

    async def run() -> None:
        batcher = Batcher(broken)
        with pytest.raises(MemoryError):
            await batcher.scores(asked(0))
        with pytest.raises(MemoryError):  # and goes on
            await batcher.scores(asked(1))

    asyncio.run(run())

"""What waits while a batch is scored makes up the next one."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from deploy.serving.batches import MAX_REQUESTS, Asked, Batcher, Outcome
from deploy.serving.scorer import Scores


def scores_of(number: int) -> Scores:
    return Scores(torch.tensor([[float(number)]]), 0, False)


def asked(number: int) -> Asked:
    """A request that is its number."""
    return cast("Asked", number)


class Scorer:
    """Scores a batch once it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, batch: Sequence[Asked]) -> list[Outcome]:
        self.batches.append(list(batch))
        self.begun.release()
        assert self.go.acquire(timeout=30)
        return [
            ZeroDivisionError() if number == 13 else scores_of(number)
            for number in cast("list[int]", list(batch))
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
    async def run() -> None:
        scorer = Scorer()
        batcher = Batcher(scorer)
        first, gone, third = (asyncio.create_task(batcher.scores(asked(i))) for i in range(3))
        await asyncio.sleep(0)
        await begun(scorer)
        gone.cancel()
        first_batch = list(scorer.batches[0])
        scorer.go.release()
        scorer.go.release()
        assert (await first).probs_BT.item() == 0
        assert (await third).probs_BT.item() == 2
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert first_batch + sum(scorer.batches[1:], []) in ([0, 2], [0, 1, 2])

    asyncio.run(run())


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

"""The direct transport without Ray: an actor whose ranks are threads, ranks whose actor is one."""

import asyncio
import multiprocessing
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.rank_group import RankGroup
from pipeline.content import transport as content_transport
from pipeline.content.actor import ContentActor
from pipeline.content.group import TensorGroup, meeting_place, of_ranks_and, wait
from pipeline.content.transport import ActorCalls, ContentServiceError, DirectTransport
from tests.pipeline.tensor_groups import sit_in_group
from tests.pipeline.test_content_actor import ROWS, WIDTH, make_actor

TIMEOUT_S, SHORT_S = 60.0, 0.5
CPU = torch.device("cpu")


def join(port: int, actor: int, member: int, size: int) -> TensorGroup:
    store = meeting_place("127.0.0.1", port, TIMEOUT_S)
    return TensorGroup(
        store, of_ranks_and(actor), member=member, size=size, device=CPU, timeout_s=TIMEOUT_S
    )


class TwoRanks:
    """Members 1 and 2 of the group of the only actor."""

    def __init__(self, actor: ContentActor) -> None:
        store = meeting_place("127.0.0.1", 0, TIMEOUT_S, opens=True)
        with ThreadPoolExecutor(2) as pool:
            joining = [pool.submit(join, store.port, 0, member, 3) for member in (1, 2)]
            asyncio.run(actor.join("127.0.0.1", store.port))
            self.groups = [future.result() for future in joining]

    def listen(self) -> list[tuple[Tensor, Any]]:
        tensors = [torch.empty(len(ROWS), WIDTH) for _ in self.groups]
        return [(t, g.broadcast(t)) for t, g in zip(tensors, self.groups, strict=True)]

    def contribute(self, gradients: np.ndarray) -> list[tuple[Tensor, Any]]:
        tensors = [torch.tensor(gradient_UH) for gradient_UH in gradients]
        return [(t, g.add_to_first(t)) for t, g in zip(tensors, self.groups, strict=True)]


async def called(
    actor: ContentActor, gradients: np.ndarray, staleness: int
) -> dict[str, np.ndarray]:
    """Two steps' vectors and those after an update, through the object store."""
    found = {"first": await actor.encode(0, 0, ROWS)}
    if staleness:
        found["second"] = await actor.encode(1, 0, ROWS)
    for rank, gradient_UH in enumerate(gradients):
        await actor.contribute(0, rank, gradient_UH)
    await actor.update(0, 1.0, await actor.finish(0, staleness))
    if not staleness:
        found["second"] = await actor.encode(1, 1, ROWS)
    return found | {"now": await actor.encode_now(1, ROWS, exact=True)}


@pytest.mark.parametrize("staleness", [0, 1])
def test_it_trains_the_same_weights_however_calls_come_in(staleness: int, tmp_path: Path) -> None:
    gradients = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
    in_turn = ["first", "sum", "update", "second", "now"]
    if staleness:
        in_turn = ["first", "second", "sum", "update", "now"]
    turns = {name: turn for turn, name in enumerate(in_turn)}

    async def directly(actor: ContentActor, ranks: TwoRanks) -> dict[str, np.ndarray]:
        posted = {
            name: ranks.contribute(gradients) if name == "sum" else ranks.listen()
            for name in in_turn
            if name != "update"
        }
        calls = []
        for call in (
            actor.encode_now(1, ROWS, exact=True, turn=turns["now"]),
            actor.encode(1, 1 - staleness, ROWS, turns["second"]),
            actor.encode(0, 0, ROWS, turns["first"]),
        ):
            calls.append(asyncio.create_task(call))
            await asyncio.sleep(0.02)
        await actor.update(
            0, 1.0, await actor.finish(0, staleness, turns["sum"]), turn=turns["update"]
        )
        assert await asyncio.gather(*calls) == [None] * len(calls)
        for _, work in sum(posted.values(), []):
            wait(work, TIMEOUT_S)
        for name in ("first", "second", "now"):
            (one, _), (other, _) = posted[name]
            assert torch.equal(one, other)
        return {name: posted[name][0][0].numpy() for name in ("first", "second", "now")}

    expected = asyncio.run(called(make_actor(tmp_path, staleness=staleness), gradients, staleness))
    actor = make_actor(tmp_path, actor=0, staleness=staleness, timeout_s=TIMEOUT_S)
    found = asyncio.run(directly(actor, TwoRanks(actor)))
    # Sums of two numbers have no order.
    for name, vectors_UH in expected.items():
        np.testing.assert_array_equal(found[name], vectors_UH, err_msg=name)
    assert not np.array_equal(expected["first"], expected["now"])


def test_an_actor_that_waits_for_ranks_lets_calls_in_and_says_for_whom_it_waited(
    tmp_path: Path,
) -> None:
    async def lonely(actor: ContentActor, ranks: TwoRanks) -> None:
        posted = ranks.listen()
        await actor.encode(0, 0, ROWS, 0)
        for _, work in posted:
            wait(work, TIMEOUT_S)
        actor.service = actor.service.model_copy(update={"timeout_s": SHORT_S})
        ranks.groups[0].add_to_first(torch.zeros(3, WIDTH))
        ending = asyncio.create_task(actor.finish(0, 0, 1))
        await asyncio.sleep(0.05)
        await actor.contribute(0, 1, np.zeros((3, WIDTH), np.float32))
        assert not ending.done()
        with pytest.raises(
            TimeoutError, match="actor 0 .* 0.5 s to finish step 0 for the gradients"
        ):
            await ending

    actor = make_actor(tmp_path, actor=0, timeout_s=TIMEOUT_S)
    ranks = TwoRanks(actor)
    asyncio.run(lonely(actor, ranks))
    # The other rank comes at last: who drops a group waits for what is posted in it.
    ranks.groups[1].add_to_first(torch.zeros(3, WIDTH))


class RecordingActor:
    """Counts what it is asked for; the test answers in its name, in a group with one rank."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.pool = ThreadPoolExecutor(1)

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> str:
            self.asked.append((method, args, kwargs))
            if method == "join":
                self.joining = self.pool.submit(self._join, *args)
            return method

        return SimpleNamespace(remote=remote)

    def _join(self, host: str, port: int) -> TensorGroup:
        return join(port, self.number, 0, 2)


@pytest.fixture
def connected(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[DirectTransport, list[RecordingActor], list[TensorGroup]]]:
    """A rank with two actors; what they answer does not matter."""
    monkeypatch.setattr(content_transport.ray, "get", lambda answers, timeout: answers)
    monkeypatch.setattr(content_transport.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actors = [RecordingActor(0), RecordingActor(1)]
    calls = ActorCalls(actors, rank=0, timeout_s=TIMEOUT_S)
    transport = DirectTransport(calls, RankGroup(), CPU, width=2)
    groups = [actor.joining.result() for actor in actors]
    yield transport, actors, groups
    transport.close(is_orderly=True)


def test_a_rank_goes_on_before_vectors_come_and_gradients_are_taken(connected: Any) -> None:
    transport, actors, groups = connected
    asked = transport.request(7, 7, torch.arange(5))
    sent = transport.learn(6, torch.ones(3, 2), 0.5, 7)  # both returned: nobody answered yet

    first, second = torch.full((3, 2), 1.0), torch.full((2, 2), 2.0)
    sums = [torch.zeros(2, 2), torch.zeros(1, 2)]
    for group, vectors, total in zip(groups, (first, second), sums, strict=True):
        group.broadcast(vectors)
        work = group.add_to_first(total)
        wait(work, TIMEOUT_S)
    assert torch.equal(transport.received(asked, "vectors"), torch.cat([first, second]))
    transport.settle(sent, "the update")
    assert all(total.eq(1).all() for total in sums)

    for number, actor in enumerate(actors):
        _, encode, finish, update = actor.asked
        assert (encode[0], *encode[1][:2], encode[1][3]) == ("encode", 7, 7, 0)
        assert encode[1][2].tolist() == [[0, 1, 2], [3, 4]][number]
        assert finish == ("finish", (6, 7, 1), {})
        assert update == ("update", (6, 0.5, "finish", "finish"), {"turn": 2})


def test_a_rank_that_waits_too_long_says_for_what_and_for_which_actor(connected: Any) -> None:
    transport, _, groups = connected
    transport._calls = replace(transport._calls, timeout_s=SHORT_S)
    asked = transport.request(3, 3, torch.arange(4))
    groups[0].broadcast(torch.ones(2, 2))
    started = time.monotonic()
    message = re.escape("rank 0 waited for vectors of step 3 for 0.5 s, in the group of the ranks")
    with pytest.raises(ContentServiceError, match=f"{message} and actor 1; .*timeout_s"):
        transport.received(asked, "vectors of step 3")
    assert time.monotonic() - started < TIMEOUT_S / 2


class DyingActor(RecordingActor):
    """Its member of the group is a process."""

    def _join(self, host: str, port: int) -> Any:
        self.process = multiprocessing.get_context("spawn").Process(
            target=sit_in_group, args=(port,), daemon=True
        )
        self.process.start()
        return self.process


def test_an_actor_that_dies_ends_a_wait_long_before_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(content_transport.ray, "get", lambda answers, timeout: answers)
    monkeypatch.setattr(content_transport.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actor = DyingActor(0)
    transport = DirectTransport(
        ActorCalls([actor], rank=0, timeout_s=TIMEOUT_S), RankGroup(), CPU, width=2
    )
    asked = transport.request(3, 3, torch.arange(4))
    actor.process.kill()
    started = time.monotonic()
    with pytest.raises(ContentServiceError, match="rank 0 waited for .* but actor 0 or .* died"):
        transport.received(asked, "vectors of step 3")
    assert time.monotonic() - started < TIMEOUT_S / 2
    transport.close(is_orderly=False)

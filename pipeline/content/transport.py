"""How vectors and gradients travel between a rank and the actors of the content service.

    object store    every rank calls every actor: rows there, vectors back; gradients there
    direct          rank 0 alone calls them. An actor broadcasts its vectors to all ranks, and their
                    gradients are reduced to it, in a process group of that actor and the ranks;
                    actors add up the gradients of parameters in a group of theirs

Nobody waits for ever in the direct transport. Every operation of a group has a turn: its number in
the order in which the ranks post operations, which is the same on all ranks. An actor carries its
operations out one at a time, in the order of turns, whenever their calls come in. So all processes
agree on one order over all groups, and the operation that comes first in it can always end:

- ranks post and go on, and wait for an operation only after the posts of all before it; rank 0
  calls the actors before it posts its own part;
- an actor's part waits for computing, which waits only for operations of earlier turns: the vectors
  of a step for the updates before it, an update for the gradients of its step;
- an actor waits for operations in a thread of its own, so its other calls get in meanwhile.

Whoever dies or hangs ends those waits by an error or the timeout, and all processes with them: the
groups live as long as ranks and actors do, and those that restart meet in new ones.
"""

# Shapes: G items encoded in a step, H width of the fused vectors, R rows of the store.

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from embedding.errors import UserError
from multimodal.content_config import Service
from multimodal.rank_group import RankGroup
from pipeline.content.group import TensorGroup, meeting_place, of_ranks_and, wait

logger = logging.getLogger(__name__)

_ITEMS_PER_TURN = 1024
"""That an actor encodes for all ranks, when all items are encoded anew: the timeout is one of an
answer, not of a catalogue."""


class ContentServiceError(RuntimeError):
    """An actor died, or did not answer in time; the ranks restart from their checkpoint."""


@dataclass
class Pending:
    """What a rank asked for or sent, and has not waited for."""

    answers: list[Any]
    """Of actors."""
    works: list[dist.Work | None] = field(default_factory=list)
    """Posted operations, one an actor."""
    tensor: Tensor | None = None
    """Of the operations; it lives until they are done."""


class Transport(Protocol):
    """A rank's end. Every rank makes the same calls in the same order."""

    def request(self, step: int, num_updates: int, rows_G: Tensor) -> Pending:
        """Have the actors encode a step's items with weights so often updated; does not wait."""
        ...

    def received(self, asked: Pending, what: str) -> Tensor:
        """The vectors (G, H) of a request."""
        ...

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float, last_asked: int) -> Pending:
        """Send this rank's gradient; rank 0 has the actors step. Does not wait."""
        ...

    def settle(self, pending: Pending, what: str) -> list[Any]:
        """Wait for all of it; the actors' answers."""
        ...

    def encode_all(self, num_updates: int, num_rows: int, *, exact: bool) -> Tensor:
        """Vectors of all rows, (R, H); every item is encoded by one actor."""
        ...

    def close(self, *, is_orderly: bool) -> None:
        """Before the actors end; `is_orderly`: all ranks call it."""


@dataclass(frozen=True)
class ActorCalls:
    """The actors, and how a rank waits for what they answer."""

    actors: Sequence[Any]
    rank: int
    timeout_s: float

    def get(self, answers: list[Any], what: str, timeout_s: float | None = None) -> list[Any]:
        """Wait for answers, `timeout_s` or as long as the recipe lets a step wait.

        Raises:
            UserError: an actor raised it.
            ContentServiceError: an actor is dead or too late.
        """
        remedy = "raise content.placement.timeout_s"
        if timeout_s is not None:
            remedy = (
                "give the cluster the CPUs and GPUs that they ask for; where they run and are too "
                "slow, give each a GPU or more CPUs, or its towers fewer trainable_layers"
            )
        timeout_s = timeout_s or self.timeout_s
        waited = f"rank {self.rank} waited for {what}"
        try:
            found: list[Any] = ray.get(answers, timeout=timeout_s)
        except GetTimeoutError as error:
            raise ContentServiceError(
                f"{waited} for {timeout_s:g} s; see the log of the content actors, or {remedy}"
            ) from error
        except RayActorError as error:
            raise ContentServiceError(f"{waited}, but an actor died: {error}") from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise ContentServiceError(f"{waited}, but an actor failed: {error}") from error
        return found

    def parts(self, of_all: Tensor) -> list[Tensor]:
        """Consecutive parts, one an actor; some may be empty."""
        size = -(-len(of_all) // len(self.actors))
        return [of_all[i * size : (i + 1) * size] for i in range(len(self.actors))]


class StoreTransport:
    """As messages of Ray: numpy arrays, through host memory and the object store."""

    def __init__(
        self, calls: ActorCalls, ranks: RankGroup, device: torch.device, *, width: int
    ) -> None:
        self._calls = calls
        self._ranks = ranks
        self._device = device
        self._width = width

    def request(self, step: int, num_updates: int, rows_G: Tensor) -> Pending:
        """Every rank asks every actor: the answer is what it waits for."""
        return Pending(
            [
                actor.encode.remote(step, num_updates, part.numpy())
                for actor, part in self._by_actor(rows_G.cpu())
            ]
        )

    def received(self, asked: Pending, what: str) -> Tensor:
        """Joined on the rank's device."""
        return self._joined(self.settle(asked, what))

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float, last_asked: int) -> Pending:
        """Gradients of parameters go from actor to actor, without passing rank 0."""
        sent = Pending(
            [
                actor.contribute.remote(step, self._ranks.rank, part.numpy())
                for actor, part in self._by_actor(gradient_GH.cpu())
            ]
        )
        if self._ranks.rank == 0:
            actors = self._calls.actors
            gradients = [actor.finish.remote(step, last_asked) for actor in actors]
            sent.answers += [actor.update.remote(step, rate_factor, *gradients) for actor in actors]
        return sent

    def settle(self, pending: Pending, what: str) -> list[Any]:
        """Nothing but answers."""
        return self._calls.get(pending.answers, what)

    def encode_all(self, num_updates: int, num_rows: int, *, exact: bool) -> Tensor:
        """Every item is encoded for one rank, and the ranks gather them."""
        own = self._ranks.share(torch.arange(num_rows))
        found = [torch.empty(0, self._width, device=self._device)]
        # An actor serves the ranks one after another, and all of them ask it at once.
        size = max(1, _ITEMS_PER_TURN // self._ranks.world_size)
        for piece in own.split(size * len(self._calls.actors)):
            answers = [
                actor.encode_now.remote(num_updates, part.numpy(), exact=exact)
                for actor, part in self._by_actor(piece)
            ]
            found.append(self._joined(self._calls.get(answers, _all_of(num_rows))))
        return self._ranks.gather(torch.cat(found), num_rows)

    def close(self, *, is_orderly: bool) -> None:
        """Nothing is open."""

    def _by_actor(self, of_all: Tensor) -> list[tuple[Any, Tensor]]:
        return list(zip(self._calls.actors, self._calls.parts(of_all), strict=True))

    def _joined(self, parts: Sequence[Any]) -> Tensor:
        return torch.cat([torch.tensor(part) for part in parts]).to(self._device)


class DirectTransport:
    """From device to device; see the module's docstring."""

    def __init__(
        self, calls: ActorCalls, ranks: RankGroup, device: torch.device, *, width: int
    ) -> None:
        """Returns once all ranks and actors are connected."""
        self._calls = calls
        self._ranks = ranks
        self._device = device
        self._width = width
        self._turn = 0
        self._groups = self._meet()

    def request(self, step: int, num_updates: int, rows_G: Tensor) -> Pending:
        """The broadcasts are posted with the request: vectors come in as soon as there are any."""
        turn = self._turns(1)
        answers = []
        if self._ranks.rank == 0:
            parts = self._calls.parts(rows_G.cpu())
            answers = [
                actor.encode.remote(step, num_updates, part.numpy(), turn)
                for actor, part in zip(self._calls.actors, parts, strict=True)
            ]
        return self._listening(answers, len(rows_G))

    def received(self, asked: Pending, what: str) -> Tensor:
        """Where the broadcasts wrote them."""
        self.settle(asked, what)
        assert asked.tensor is not None
        return asked.tensor

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float, last_asked: int) -> Pending:
        """Two turns: gradients of vectors to their actor, those of parameters among actors."""
        turn = self._turns(2)
        sent = Pending([], tensor=gradient_GH.contiguous())
        if self._ranks.rank == 0:
            actors = self._calls.actors
            done = [actor.finish.remote(step, last_asked, turn) for actor in actors]
            sent.answers = [
                actor.update.remote(step, rate_factor, *done, turn=turn + 1) for actor in actors
            ]
        assert sent.tensor is not None
        parts = self._calls.parts(sent.tensor)
        sent.works = [g.add_to_first(part) for g, part in zip(self._groups, parts, strict=True)]
        return sent

    def settle(self, pending: Pending, what: str) -> list[Any]:
        """On rank 0 answers first: an actor's error is the cause of what others wait for."""
        answers = self._calls.get(pending.answers, what)
        waited = f"rank {self._calls.rank} waited for {what}"
        deadline = time.monotonic() + self._calls.timeout_s
        for actor, work in enumerate(pending.works):
            try:
                wait(work, deadline - time.monotonic())
            except TimeoutError as error:
                raise ContentServiceError(
                    f"{waited} for {self._calls.timeout_s:g} s, in the group of the ranks and "
                    f"actor {actor}; see the logs of both, or raise content.placement.timeout_s"
                ) from error
            except RuntimeError as error:
                raise ContentServiceError(
                    f"{waited}, but actor {actor} or another rank died: {error}"
                ) from error
        return answers

    def encode_all(self, num_updates: int, num_rows: int, *, exact: bool) -> Tensor:
        """Every item is encoded for all ranks."""
        found = [torch.empty(0, self._width, device=self._device)]
        for piece in torch.arange(num_rows).split(_ITEMS_PER_TURN * len(self._calls.actors)):
            turn = self._turns(1)
            answers = []
            if self._ranks.rank == 0:
                answers = [
                    actor.encode_now.remote(num_updates, part.numpy(), exact=exact, turn=turn)
                    for actor, part in zip(
                        self._calls.actors, self._calls.parts(piece), strict=True
                    )
                ]
            found.append(self.received(self._listening(answers, len(piece)), _all_of(num_rows)))
        return torch.cat(found)

    def close(self, *, is_orderly: bool) -> None:
        """All ranks leave the groups before an actor does, if they all do."""
        for group in self._groups:
            group.leave()
        if is_orderly:
            self._ranks.barrier()

    def _listening(self, answers: list[Any], count: int) -> Pending:
        vectors_GH = torch.empty(count, self._width, device=self._device)
        parts = self._calls.parts(vectors_GH)
        works = [g.broadcast(part) for g, part in zip(self._groups, parts, strict=True)]
        return Pending(answers, works, vectors_GH)

    def _turns(self, count: int) -> int:
        first = self._turn
        self._turn += count
        return first

    def _meet(self) -> list[TensorGroup]:
        """The groups of this rank, one an actor: the actor is member 0 of its own."""
        address, joined = None, []
        if self._ranks.rank == 0:
            host = ray.util.get_node_ip_address()
            # Kept: members ask it until they are connected.
            self._store = meeting_place(host, 0, self._calls.timeout_s, opens=True)
            address = (host, self._store.port)
            joined = [actor.join.remote(*address) for actor in self._calls.actors]
        host, port = self._ranks.said_by_first(address)
        if self._ranks.rank != 0:
            self._store = meeting_place(host, port, self._calls.timeout_s)
        what = "the ranks and actors of the content service to connect"
        try:
            groups = [
                TensorGroup(
                    self._store,
                    of_ranks_and(actor),
                    member=1 + self._ranks.rank,
                    size=1 + self._ranks.world_size,
                    device=self._device,
                    timeout_s=self._calls.timeout_s,
                )
                for actor in range(len(self._calls.actors))
            ]
        except (TimeoutError, RuntimeError) as error:
            raise ContentServiceError(
                f"rank {self._calls.rank} waited for {what} at {host}:{port}, but: {error}; see "
                "the log of the content actors, open the network between them, or set "
                "content.placement.transport to object_store"
            ) from error
        self._calls.get(joined, what)
        return groups


def make_transport(
    service: Service, calls: ActorCalls, ranks: RankGroup, device: torch.device, width: int
) -> Transport:
    """The one that the recipe asks for, or that suits the devices."""
    on_gpu = device.type == "cuda"
    if service.is_direct(ranks_on_gpu=on_gpu):
        return DirectTransport(calls, ranks, device, width=width)
    obstacle = service.obstacle(ranks_on_gpu=on_gpu)
    if service.transport == "auto" and obstacle is not None and ranks.rank == 0:
        logger.warning("content vectors travel through Ray's object store: %s", obstacle)
    return StoreTransport(calls, ranks, device, width=width)


def _all_of(num_rows: int) -> str:
    return f"vectors of all {num_rows} items"

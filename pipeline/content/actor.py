"""A Ray actor that owns a replica of the content encoder, and trains it for the ranks.

Vectors are fused ones: the encoder's last layer is the ranks' (`multimodal.content_head`).

    ranks --- encode(t, rows) ------> every actor: its share of the step's items, once for all ranks
          <-- vectors --------------
          --- contribute(t, grad) --> waits until all ranks have
    rank 0 -- finish(t) ------------> gradient of the parameters from the actor's share
           -- update(t, gradients) -> adds those of all actors up, and steps

That is the transport through Ray's object store. In the direct one only rank 0 calls, with a turn,
and vectors and gradients are operations of process groups (`pipeline.content.transport`):

    rank 0 -- encode(t, rows, turn) -> broadcasts the vectors to all ranks
           -- finish(t, turn) -------> takes the sum of the ranks' gradients
           -- update(t, turn) -------> takes the sum of the actors' gradients, and steps

Methods are coroutines: one that waits for other ranks lets their calls in. So Ray starts calls in
any order, and each waits for those that it must follow: which weights a vector or a gradient comes
from never depends on timing. No wait lasts longer than the timeout, and its error says who waited
for what.
"""

# Shapes: U rows of this actor's share, H width of the fused vectors, P elements of all trained
# parameters.

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.content_config import ContentConfig, Service
from multimodal.content_encoder import load_content_encoder, rows_to_standardise
from multimodal.content_learner import ContentLearner
from multimodal.stored_content import ContentReader
from pipeline.content.group import OF_ACTORS, TensorGroup, meeting_place, of_ranks_and, wait
from pipeline.content.paths import ContentPaths

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


class ContentActor:
    """One actor of the service."""

    def __init__(self, config: str, paths: str, *, actor: int, num_ranks: int) -> None:
        """`config` and `paths` are the JSON of `ContentConfig` and `ContentPaths`."""
        self.config = ContentConfig.model_validate_json(config)
        service = self.config.placement
        assert isinstance(service, Service)
        self.service = service
        self.actor = actor
        self.num_ranks = num_ranks
        self.paths = ContentPaths.model_validate_json(paths)
        self._num_updates = 0
        self._encodings: dict[int, _Encoding] = {}
        self._changed = asyncio.Condition()
        self._turn = 0
        """Of the operation of a group that comes next."""
        self._operations = ThreadPoolExecutor(1)
        """Waits for other members, while the actor's calls get in."""

    async def ready(self) -> None:
        """Load the towers; everything else comes after it, and first `standardise`.

        Not when the actor is made: of an error there, Ray passes on the text alone.

        Raises:
            UserError: a tower cannot be loaded, or is not the one whose tokens are stored.
        """
        torch.set_num_threads(max(math.floor(self.service.cpus_per_actor), 1))
        reader = ContentReader(self.paths.index, self.paths.stores)
        reader.require_towers(self.config)
        self.learner = ContentLearner(
            self.config,
            load_content_encoder(self.config),
            reader.read,
            torch.device("cuda" if self.service.gpus_per_actor else "cpu"),
        )
        self._to_standardise = rows_to_standardise(reader.num_items, self.config.seed)

    async def moments(self) -> Doubles:
        """What `standardise` needs (3, H), of this actor's share of the items; shares add up."""
        share = self._to_standardise.tensor_split(self.service.num_actors)[self.actor]
        return self.learner.moments(share).cpu().numpy()

    async def standardise(self, moments_3H: Doubles) -> None:
        """Standardise what the last layer reads over all items, before anything else is asked."""
        self.learner.standardise(torch.tensor(moments_3H, device=self.learner.device))

    async def head(self) -> Arrays:
        """State of the encoder's last layer as training starts; the ranks train it."""
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.learner.head().items()}

    async def join(self, host: str, port: int) -> None:
        """Meet the ranks, and then the other actors, for the direct transport."""

        def meet() -> None:
            limit_s = self.service.timeout_s
            device = self.learner.device
            store = meeting_place(host, port, limit_s)
            self._ranks = TensorGroup(
                store,
                of_ranks_and(self.actor),
                member=0,
                size=1 + self.num_ranks,
                device=device,
                timeout_s=limit_s,
            )
            self._actors = TensorGroup(
                store,
                OF_ACTORS,
                member=self.actor,
                size=self.service.num_actors,
                device=device,
                timeout_s=limit_s,
            )

        await asyncio.get_running_loop().run_in_executor(self._operations, meet)

    async def encode(
        self, step: int, num_updates: int, rows_U: Rows, turn: int | None = None
    ) -> Floats | None:
        """Vectors (U, H) of this actor's share of a step's items, with weights so often updated."""
        await self._until(
            lambda: self._num_updates >= num_updates,
            lambda: f"encode items of step {step}, the update of step {self._num_updates}",
        )
        encoding = self._encodings.get(step)
        if encoding is None:
            assert self._num_updates == num_updates, (self._num_updates, num_updates)
            vectors_UH = self.learner.start(
                step, torch.tensor(rows_U), keep_graph=self.service.staleness == 0
            )
            if turn is None:
                vectors_UH = vectors_UH.cpu()
            encoding = _Encoding(torch.tensor(rows_U), vectors_UH)
            self._encodings[step] = encoding
            await self._tell()
        return await self._given(encoding.vectors_UH, turn, f"vectors of step {step}")

    async def contribute(self, step: int, rank: int, gradient_UH: Floats) -> None:
        """Take one rank's gradient of a step's vectors."""
        self._encodings[step].gradients[rank] = gradient_UH
        await self._tell()

    async def finish(self, step: int, last_asked: int, turn: int | None = None) -> Floats | None:
        """Gradient (P,) of the parameters through this actor's share, once all ranks contributed.

        The ranks' gradients are averaged, and added in the order of ranks whoever came first; in
        the direct transport, where it stays in the actor, in the order of their group.

        Args:
            step: whose items' gradients they are.
            last_asked: the last step whose items the ranks asked for: they are encoded before this
                step's update.
            turn: of the sum over ranks.
        """
        await self._after(step, "finish")
        await self._until(
            lambda: last_asked in self._encodings,
            lambda: f"finish step {step}, the ranks to ask for the items of step {last_asked}",
        )
        encoding = self._encodings[step]
        if turn is None:
            total_UH = await self._contributed(step, encoding)
        else:
            total_UH = torch.zeros(encoding.vectors_UH.shape, device=self.learner.device)
            await self._in_turn(
                turn,
                lambda: self._ranks.add_to_first(total_UH),
                f"finish step {step}, the gradients of the ranks",
            )
        del self._encodings[step]
        self.learner.finish(step, encoding.rows_U, total_UH / self.num_ranks)
        return self.learner.gradient().cpu().numpy() if turn is None else None

    async def update(
        self, step: int, rate_factor: float, *gradients_P: Floats | None, turn: int | None = None
    ) -> None:
        """Step with the sum of all actors' gradients.

        Args:
            step: of the gradients.
            rate_factor: on the learning rates.
            gradients_P: of all actors; in the direct transport only that they are there.
            turn: of the sum over actors.
        """
        assert step == self._num_updates, (step, self._num_updates)
        total_P = self.learner.gradient()
        if turn is None:
            total_P.zero_()
            for gradient_P in gradients_P:
                total_P += torch.tensor(gradient_P, device=total_P.device)
        else:
            await self._in_turn(
                turn,
                lambda: self._actors.add_up(total_P),
                f"update step {step}, the gradients of the other actors",
            )
        self.learner.update(total_P, rate_factor)
        self._num_updates = step + 1
        await self._tell()

    async def encode_now(
        self, num_updates: int, rows_U: Rows, *, exact: bool, turn: int | None = None
    ) -> Floats | None:
        """Vectors (U, H) of any rows, with weights so often updated."""
        await self._after(num_updates)
        vectors_UH = self.learner.encode(torch.tensor(rows_U), exact=exact)
        return await self._given(vectors_UH, turn, "vectors")

    async def state(self, step: int) -> Arrays:
        """Weights and optimizer before a step."""
        await self._after(step)
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.learner.state().items()}

    async def load(self, step: int, state: Arrays, *, wakes: bool = False) -> None:
        """Go on at a step with this state."""
        tensors = {name: torch.tensor(array) for name, array in state.items()}
        self.learner.load(tensors, wakes=wakes)
        self._num_updates = step
        self._encodings.clear()
        await self._tell()

    async def gradient_norms(self, step: int) -> dict[str, float]:
        """Of the last update before a step."""
        await self._after(step)
        return self.learner.gradient_norms()

    async def _given(self, vectors_UH: Tensor, turn: int | None, what: str) -> Floats | None:
        if turn is None:
            return vectors_UH.cpu().numpy()
        await self._in_turn(
            turn,
            lambda: self._ranks.broadcast(vectors_UH.contiguous()),
            f"broadcast {what}, the ranks to take them",
        )
        return None

    async def _contributed(self, step: int, encoding: "_Encoding") -> Tensor:
        def lacking() -> str:
            ranks = sorted(set(range(self.num_ranks)) - set(encoding.gradients))
            return f"finish step {step}, the gradients of ranks {ranks}"

        await self._until(lambda: len(encoding.gradients) == self.num_ranks, lacking)
        total_UH = torch.zeros(encoding.vectors_UH.shape)
        for rank in range(self.num_ranks):
            total_UH += torch.tensor(encoding.gradients[rank])
        return total_UH

    async def _in_turn(self, turn: int, post: Callable[[], dist.Work | None], what: str) -> None:
        """Carry an operation of a group out after those of earlier turns, one at a time."""
        purpose = what.split(", ", 1)[0]
        await self._until(
            lambda: self._turn == turn,
            lambda: f"{purpose}, operation {self._turn} of the direct transport",
        )
        limit_s = self.service.timeout_s
        done = asyncio.get_running_loop().run_in_executor(
            self._operations, lambda: wait(post(), limit_s)
        )
        try:
            await asyncio.wait_for(done, limit_s)
        except TimeoutError as error:
            raise self._too_late(what) from error
        self._turn = turn + 1
        await self._tell()

    async def _after(self, step: int, purpose: str = "read weights before") -> None:
        await self._until(
            lambda: self._num_updates >= step,
            lambda: f"{purpose} step {step}, the update of step {self._num_updates}",
        )

    async def _tell(self) -> None:
        """Those that wait look again."""
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(condition), self.service.timeout_s)
        except TimeoutError as error:
            raise self._too_late(what()) from error

    def _too_late(self, what: str) -> TimeoutError:
        """The error of a wait; `what` is its purpose, a comma, and who or what did not come."""
        purpose, awaited = what.split(", ", 1)
        return TimeoutError(
            f"actor {self.actor} of the content service waited {self.service.timeout_s:g} s to "
            f"{purpose} for {awaited}; a rank or actor hangs or died: see its log, or raise "
            "content.placement.timeout_s"
        )


class _Encoding:
    """A step between its encoding and its update."""

    def __init__(self, rows_U: Tensor, vectors_UH: Tensor) -> None:
        self.rows_U = rows_U
        self.vectors_UH = vectors_UH
        self.gradients: dict[int, Floats] = {}
        """By rank."""

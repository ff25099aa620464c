"""A Ray actor that owns a replica of the content encoder, and trains it for the ranks.

    ranks --- encode(t, rows) ------> every actor: its share of the step's items, once for all ranks
          <-- vectors --------------
          --- contribute(t, grad) --> waits until all ranks have
    rank 0 -- finish(t) ------------> gradient of the parameters from the actor's share
           -- update(t, gradients) -> adds those of all actors up, and steps

Methods are coroutines: one that waits for other ranks lets their calls in. So Ray starts calls in
any order, and each waits for those that it must follow: which weights a vector or a gradient comes
from never depends on timing. No wait lasts longer than the timeout, and its error says who waited
for what.
"""

# Shapes: U rows of this actor's share, D content dim, P elements of all trained parameters.

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multimodal.content_config import ContentConfig, Service
from multimodal.content_encoder import load_content_encoder, rows_to_standardise
from multimodal.content_learner import ContentLearner
from multimodal.stored_content import ContentReader
from pipeline.content_paths import ContentPaths

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

    async def ready(self) -> None:
        """Load the towers; everything else comes after it.

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
            num_rows=reader.num_items,
        )
        rows_N = rows_to_standardise(reader.num_items, self.config.seed)
        self.learner.standardise(self.learner.moments(rows_N))

    async def encode(self, step: int, rank: int, num_updates: int, rows_U: Rows) -> Floats:
        """Vectors (U, D) of this actor's share of a step's items, with weights so often updated."""
        await self._until(
            lambda: self._num_updates >= num_updates,
            lambda: f"encode items of step {step}, the update of step {self._num_updates}",
        )
        encoding = self._encodings.get(step)
        if encoding is None:
            assert self._num_updates == num_updates, (self._num_updates, num_updates)
            vectors_UD = self.learner.start(
                step, torch.tensor(rows_U), keep_graph=self.service.staleness == 0
            )
            encoding = _Encoding(torch.tensor(rows_U), vectors_UD.cpu().numpy())
            self._encodings[step] = encoding
            await self._tell()
        return encoding.vectors_UD

    async def contribute(self, step: int, rank: int, gradient_UD: Floats) -> None:
        """Take one rank's gradient of a step's vectors."""
        self._encodings[step].gradients[rank] = gradient_UD
        await self._tell()

    async def finish(self, step: int, last_asked: int) -> Floats:
        """Gradient (P,) of the parameters through this actor's share, once all ranks contributed.

        The ranks' gradients are averaged, and added in the order of ranks whoever came first.

        Args:
            step: whose items' gradients they are.
            last_asked: the last step whose items the ranks asked for: they are encoded before this
                step's update.
        """
        await self._after(step, "finish")
        await self._until(
            lambda: last_asked in self._encodings,
            lambda: f"finish step {step}, the ranks to ask for the items of step {last_asked}",
        )
        encoding = self._encodings[step]

        def lacking() -> str:
            ranks = sorted(set(range(self.num_ranks)) - set(encoding.gradients))
            return f"finish step {step}, the gradients of ranks {ranks}"

        await self._until(lambda: len(encoding.gradients) == self.num_ranks, lacking)
        total_UD = torch.zeros(encoding.vectors_UD.shape)
        for rank in range(self.num_ranks):
            total_UD += torch.tensor(encoding.gradients[rank])
        del self._encodings[step]
        self.learner.finish(step, encoding.rows_U, total_UD / self.num_ranks)
        gradient_P: Floats = self.learner.gradient().cpu().numpy()
        return gradient_P

    async def update(self, step: int, rate_factor: float, *gradients_P: Floats) -> None:
        """Step with the sum of all actors' gradients."""
        assert step == self._num_updates, (step, self._num_updates)
        total_P = torch.zeros(gradients_P[0].shape)
        for gradient_P in gradients_P:
            total_P += torch.tensor(gradient_P)
        self.learner.update(total_P.to(self.learner.device), rate_factor)
        self._num_updates = step + 1
        await self._tell()

    async def encode_now(self, step: int, rows_U: Rows, exact: bool) -> Floats:
        """Vectors (U, D) of any rows, with the weights before a step."""
        await self._after(step)
        vectors_UD: Floats = self.learner.encode(torch.tensor(rows_U), exact=exact).cpu().numpy()
        return vectors_UD

    async def state(self, step: int) -> Arrays:
        """Weights and optimizer before a step."""
        await self._after(step)
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.learner.state().items()}

    async def load(self, step: int, state: Arrays) -> None:
        """Go on at a step with this state."""
        self.learner.load({name: torch.tensor(array) for name, array in state.items()})
        self._num_updates = step
        self._encodings.clear()
        await self._tell()

    async def gradient_norms(self, step: int) -> dict[str, float]:
        """Of the last update before a step."""
        await self._after(step)
        return self.learner.gradient_norms()

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
            purpose, awaited = what().split(", ", 1)
            raise TimeoutError(
                f"actor {self.actor} of the content service waited "
                f"{self.service.timeout_s:g} s to {purpose} for {awaited}; a rank or actor hangs "
                "or died: see its log, or raise content.placement.timeout_s"
            ) from error


class _Encoding:
    """A step between its encoding and its update."""

    def __init__(self, rows_U: torch.Tensor, vectors_UD: Floats) -> None:
        self.rows_U = rows_U
        self.vectors_UD = vectors_UD
        self.gradients: dict[int, Floats] = {}
        """By rank."""

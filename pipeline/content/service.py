"""A rank's end of the content service: the group of actors that own the encoder.

Rank 0 creates the actors, so they end with the ranks: a group of ranks that restarts after a death,
of a rank or an actor, gets new actors and restores them from its checkpoint.
"""

# Shapes: G items encoded in a step, H width of the fused vectors, R rows of the store.

import uuid
from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.content_config import ContentConfig, Service
from multimodal.rank_group import RankGroup
from pipeline.content.actor import ContentActor
from pipeline.content.paths import ContentPaths
from pipeline.content.transport import ActorCalls, Pending, make_transport

_LOAD_TIMEOUT_S = 600.0
"""To start actors and load towers: longer than what a step may take."""


class ServiceEncoder:
    """A `multimodal.content_source.EncoderPlacement` on Ray actors."""

    def __init__(
        self, config: ContentConfig, paths: ContentPaths, ranks: RankGroup, device: torch.device
    ) -> None:
        """Rank 0 starts the actors; returns once they have loaded their towers.

        Raises:
            UserError: a tower cannot be loaded, or the cluster has no room for the actors.
        """
        service = config.placement
        assert isinstance(service, Service)
        self._service = service
        self._ranks = ranks
        self._step = 0
        self._encodings: dict[int, Pending] = {}
        self._updates: dict[int, Pending] = {}
        """Of steps whose end was not waited for: gradients sent and, on rank 0, the updates."""
        self._owns = ranks.rank == 0
        self._actors: list[Any] = []
        """Those that this rank created, and other ranks look up."""
        try:
            self._calls = self._start(config, paths)
            self._head = self._start_of_head()
            width = self._head["weight"].shape[1]
            self._transport = make_transport(service, self._calls, ranks, device, width)
        except BaseException:
            self._end_actors()  # the process may be kept for another training
            raise

    def head(self) -> dict[str, Tensor]:
        """That of the first actor."""
        return self._head

    def request(self, step: int, rows_G: Tensor) -> None:
        """Ask every actor for its share of a step's items, with the weights learned so far."""
        self._encodings[step] = self._transport.request(step, self._step, rows_G)

    def vectors(self, step: int) -> Tensor:
        """What was requested, (G, H)."""
        # First the updates that come before: their errors are the cause of what encoding waits for.
        for done in [s for s in self._updates if s < step - self._service.staleness]:
            self._transport.settle(self._updates.pop(done), f"the update of step {done}")
        return self._transport.received(self._encodings.pop(step), f"vectors of step {step}")

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float) -> None:
        """Send this rank's gradient; rank 0 has the actors step. Does not wait for them."""
        last_asked = max(self._encodings, default=step)  # asked for ahead, or none was
        self._updates[step] = self._transport.learn(step, gradient_GH, rate_factor, last_asked)
        self._step = step + 1

    def encode_all(self, num_rows: int, *, exact: bool) -> Tensor:
        """Vectors of all rows, (R, H); every item is encoded by one actor."""
        return self._transport.encode_all(self._step, num_rows, exact=exact)

    def state(self) -> dict[str, Tensor]:
        """That of the first actor; empty on other ranks."""
        if not self._owns:
            return {}
        (arrays,) = self._calls.get(
            [self._calls.actors[0].state.remote(self._step)],
            f"the weights before step {self._step}",
        )
        return _tensors(arrays)

    def load(self, tensors: Mapping[str, Tensor], *, wakes: bool = False) -> None:
        """Into all actors; returns once they go on from it."""
        self._step = int(tensors["step"][0]) if "step" in tensors else 0
        failure: str | None = None
        if self._owns:
            learned = {
                name: tensor.numpy()
                for name, tensor in tensors.items()
                if name.startswith(("encoder/", "optimizer/"))
            }
            state = ray.put(learned)
            answers = [
                actor.load.remote(self._step, state, wakes=wakes) for actor in self._calls.actors
            ]
            try:
                self._calls.get(answers, "the actors to load a checkpoint", _LOAD_TIMEOUT_S)
            except UserError as error:
                failure = str(error)
        failure = self._ranks.said_by_first(failure)
        if failure is not None:
            raise UserError(failure)

    def gradient_norms(self) -> dict[str, float]:
        """Of the last step; on rank 0."""
        (norms,) = self._calls.get(
            [self._calls.actors[0].gradient_norms.remote(self._step)], "the norms of gradients"
        )
        return dict(norms)

    def close(self, *, is_orderly: bool) -> None:
        """Leave the transport, and end the actors."""
        self._transport.close(is_orderly=is_orderly)
        self._end_actors()

    def _end_actors(self) -> None:
        if self._owns:
            for actor in self._actors:
                ray.kill(actor)

    def _start(self, config: ContentConfig, paths: ContentPaths) -> ActorCalls:
        names: list[str] | None = None
        failure: str | None = None
        if self._owns:
            group = uuid.uuid4().hex[:12]
            names = [f"content-{group}-{i}" for i in range(self._service.num_actors)]
            for i, name in enumerate(names):
                self._actors.append(self._create(config, paths, i, name))
            try:
                calls = self._calls_of(self._actors)
                calls.get(
                    [actor.ready.remote() for actor in self._actors],
                    "the actors of the content service to load their towers (they ask for "
                    f"{self._service.num_actors} x {self._service.cpus_per_actor:g} CPUs and "
                    f"{self._service.gpus_per_actor:g} GPUs beside the ranks)",
                    _LOAD_TIMEOUT_S,
                )
                self._standardise(calls)
            except UserError as error:
                failure = str(error)
        names, failure = self._ranks.said_by_first((names, failure))
        if failure is not None:
            raise UserError(failure)
        self._actors = self._actors or [ray.get_actor(name) for name in names]
        return self._calls_of(self._actors)

    def _standardise(self, calls: ActorCalls) -> None:
        """Each actor goes through its share of the items; sums are added in the order of shares."""
        what = "the actors of the content service to standardise the items"
        shares = [actor.moments.remote() for actor in calls.actors]
        moments_3H = ray.put(sum(calls.get(shares, what, _LOAD_TIMEOUT_S)))
        answers = [actor.standardise.remote(moments_3H) for actor in calls.actors]
        calls.get(answers, what, _LOAD_TIMEOUT_S)

    def _start_of_head(self) -> dict[str, Tensor]:
        (arrays,) = self._calls.get([self._calls.actors[0].head.remote()], "the last layer's start")
        return _tensors(arrays)

    def _calls_of(self, actors: list[Any]) -> ActorCalls:
        return ActorCalls(actors, self._ranks.rank, self._service.timeout_s)

    def _create(self, config: ContentConfig, paths: ContentPaths, actor: int, name: str) -> Any:
        # Ray puts it where the rank lets its actors in: a trial of a study has reserved their room,
        # the placement group of Ray Train is for ranks only and lets none in.
        remote = ray.remote(ContentActor).options(
            name=name,
            num_cpus=self._service.cpus_per_actor,
            num_gpus=self._service.gpus_per_actor,
        )
        return remote.remote(
            config.model_dump_json(),
            paths.model_dump_json(),
            actor=actor,
            num_ranks=self._ranks.world_size,
        )


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in arrays.items()}

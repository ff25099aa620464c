"""A rank's end of the content service: the group of actors that own the encoder.

Rank 0 creates the actors, so they end with the ranks: a group of ranks that restarts after a death,
of a rank or an actor, gets new actors and restores them from its checkpoint.
"""

# Shapes: G items encoded in a step, D content dim, R rows of the store.

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from embedding.errors import UserError
from multimodal.content_config import ContentConfig, Service
from multimodal.rank_group import RankGroup
from pipeline.content_actor import ContentActor
from pipeline.content_paths import ContentPaths

_LOAD_TIMEOUT_S = 600.0
"""To start actors and load towers: longer than what a step may take."""
_ITEMS_PER_TURN = 1024
"""That an actor encodes for all ranks, when all items are encoded anew: the timeout is one of an
answer, not of a catalogue."""


class ContentServiceError(RuntimeError):
    """An actor died, or did not answer in time; the ranks restart from their checkpoint."""


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
        self._device = device
        self._step = 0
        self._encodings: dict[int, list[Any]] = {}
        self._updates: dict[int, list[Any]] = {}
        """Of steps whose end was not waited for: gradients sent and, on rank 0, the updates."""
        self._dim = config.dim
        self._owns = ranks.rank == 0
        self._actors: list[Any] = []
        try:
            self._start(config, paths)
        except BaseException:
            self.close()  # the process may be kept for another training
            raise

    def request(self, step: int, rows_G: Tensor) -> None:
        """Ask every actor for its share of a step's items, with the weights learned so far."""
        rank = self._ranks.rank
        self._encodings[step] = [
            actor.encode.remote(step, rank, self._step, part.cpu().numpy())
            for actor, part in zip(self._actors, self._parts(rows_G), strict=True)
        ]

    def vectors(self, step: int) -> Tensor:
        """What was requested, (G, D)."""
        what = f"vectors of step {step}"
        # First the updates that come before: their errors are the cause of what encoding waits for.
        for done in [s for s in self._updates if s < step - self._service.staleness]:
            self._get(self._updates.pop(done), f"the update of step {done}")
        return self._joined(self._get(self._encodings.pop(step), what))

    def learn(self, step: int, gradient_GD: Tensor, rate_factor: float) -> None:
        """Send this rank's gradient; rank 0 has the actors step. Does not wait for them."""
        host_GD = gradient_GD.cpu()
        self._updates[step] = [
            actor.contribute.remote(step, self._ranks.rank, part.numpy())
            for actor, part in zip(self._actors, self._parts(host_GD), strict=True)
        ]
        if self._owns:
            last_asked = max(self._encodings, default=step)  # asked for ahead, or none was
            gradients = [actor.finish.remote(step, last_asked) for actor in self._actors]
            self._updates[step] += [
                actor.update.remote(step, rate_factor, *gradients) for actor in self._actors
            ]
        self._step = step + 1

    def encode_all(self, num_rows: int, *, exact: bool) -> Tensor:
        """Vectors of all rows, (R, D); every item is encoded by one actor for one rank."""
        own = self._ranks.share(torch.arange(num_rows))
        found = [torch.empty(0, self._dim, device=self._device)]
        # An actor serves the ranks one after another, and all of them ask it at once.
        size = max(1, _ITEMS_PER_TURN // self._ranks.world_size)
        for piece in own.split(size * len(self._actors)):
            answers = [
                actor.encode_now.remote(self._step, part.numpy(), exact)
                for actor, part in zip(self._actors, self._parts(piece), strict=True)
            ]
            found.append(self._joined(self._get(answers, f"vectors of all {num_rows} items")))
        return self._ranks.gather(torch.cat(found), num_rows)

    def state(self) -> dict[str, Tensor]:
        """That of the first actor; empty on other ranks."""
        if not self._owns:
            return {}
        (arrays,) = self._get(
            [self._actors[0].state.remote(self._step)], f"the weights before step {self._step}"
        )
        return {name: torch.tensor(array) for name, array in arrays.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
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
            answers = [actor.load.remote(self._step, state) for actor in self._actors]
            try:
                self._get(answers, "the actors to load a checkpoint", _LOAD_TIMEOUT_S)
            except UserError as error:
                failure = str(error)
        failure = self._said_by_rank_0(failure)
        if failure is not None:
            raise UserError(failure)

    def gradient_norms(self) -> dict[str, float]:
        """Of the last step; on rank 0."""
        (norms,) = self._get(
            [self._actors[0].gradient_norms.remote(self._step)], "the norms of gradients"
        )
        return dict(norms)

    def close(self) -> None:
        """End the actors."""
        if self._owns:
            for actor in self._actors:
                ray.kill(actor)

    def _start(self, config: ContentConfig, paths: ContentPaths) -> None:
        names: list[str] | None = None
        failure: str | None = None
        if self._owns:
            group = uuid.uuid4().hex[:12]
            names = [f"content-{group}-{i}" for i in range(self._service.num_actors)]
            for i, name in enumerate(names):
                self._actors.append(self._create(config, paths, i, name))
            try:
                self._get(
                    [actor.ready.remote() for actor in self._actors],
                    "the actors of the content service to load their towers (they ask for "
                    f"{self._service.num_actors} x {self._service.cpus_per_actor:g} CPUs and "
                    f"{self._service.gpus_per_actor:g} GPUs beside the ranks)",
                    _LOAD_TIMEOUT_S,
                )
            except UserError as error:
                failure = str(error)
        names, failure = self._said_by_rank_0((names, failure))
        if failure is not None:
            raise UserError(failure)
        self._actors = self._actors or [ray.get_actor(name) for name in names]

    def _create(self, config: ContentConfig, paths: ContentPaths, actor: int, name: str) -> Any:
        remote = ray.remote(ContentActor).options(
            name=name,
            num_cpus=self._service.cpus_per_actor,
            num_gpus=self._service.gpus_per_actor,
            # Not in the placement group of the ranks: it has room for ranks only.
            scheduling_strategy="DEFAULT",
        )
        return remote.remote(
            config.model_dump_json(),
            paths.model_dump_json(),
            actor=actor,
            num_ranks=self._ranks.world_size,
        )

    def _said_by_rank_0(self, value: Any) -> Any:
        if self._ranks.world_size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def _parts(self, of_all: Tensor) -> list[Tensor]:
        """Consecutive parts, one an actor; some may be empty."""
        size = -(-len(of_all) // len(self._actors))
        return [of_all[i * size : (i + 1) * size] for i in range(len(self._actors))]

    def _joined(self, parts: Sequence[Any]) -> Tensor:
        return torch.cat([torch.tensor(part) for part in parts]).to(self._device)

    def _get(self, answers: list[Any], what: str, timeout_s: float | None = None) -> list[Any]:
        """Wait for answers of actors, `timeout_s` or as long as the recipe lets a step wait.

        Raises:
            UserError: an actor raised it.
            ContentServiceError: an actor is dead or too late.
        """
        remedy = "raise content.placement.timeout_s"
        if timeout_s is not None:
            remedy = "give the cluster the CPUs and GPUs that they ask for"
        timeout_s = timeout_s or self._service.timeout_s
        waited = f"rank {self._ranks.rank} waited for {what}"
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

"""Ray workers that look codes up, for sets that would keep one process busy for too long."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from embedding.errors import UserError
from embedding.memory import WORKER_ENVIRONMENT
from embedding.precision import exact_products
from multimodal.codes.config import EncodeWorkers
from multimodal.codes.residual_quantizer import CPU
from pipeline.cluster import Bundle, RaySession, fitting
from pipeline.codes.encode_items import CodeAssigner, Encoded, LookUp, Piece
from pipeline.devices import own_device

_RETRIES = 2
"""So often a worker that died, with its node perhaps, is started again and gets its piece again."""


class EncodeActor:
    """Looks up piece after piece; codebooks are loaded with the first one."""

    def __init__(self, look_up: LookUp, config: EncodeWorkers) -> None:
        self._look_up = look_up
        self._config = config
        self._assign: CodeAssigner | None = None

    def ready(self) -> None:
        """Answers once the process runs."""

    def encode(self, piece: Piece) -> Encoded | UserError:
        """The codes of a piece; a fault of the user travels as data, and stays whole."""
        try:
            # Products in TF32 would propose too little.
            with exact_products():
                if self._assign is None:
                    torch.set_num_threads(max(1, int(self._config.cpus_per_worker)))
                    device = own_device() if self._config.gpus_per_worker else CPU
                    self._assign = CodeAssigner.load(self._look_up, device)
                return self._assign(piece)
        except UserError as error:
            return error


@dataclass(frozen=True)
class RayPieces:
    """`RunPieces` on the cluster of a command."""

    session: RaySession
    progress: Callable[[int, int], None]
    """Called with items done and in all."""

    def __call__(
        self, pieces: Iterator[Piece], sizes: Sequence[int], look_up: LookUp, config: EncodeWorkers
    ) -> Iterator[tuple[int, Encoded]]:
        """Numbers and codes of the pieces, as they are done; one piece a worker at a time.

        Raises:
            UserError: the cluster has no room for a worker, or a worker raised it.
        """
        asked = worker_of(config)
        self.session.wait_for("quantize", [asked])
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_workers = min(len(sizes), workers_that_fit(nodes, config))
        actor_class = ray.remote(EncodeActor).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
        actors = [actor_class.remote(look_up, config) for _ in range(num_workers)]
        # A worker gets a piece once it runs: where others hold its CPUs, the rest do its share.
        starting = {actor.ready.remote(): actor for actor in actors}
        running: dict[Any, tuple[int, Any]] = {}
        todo, done, num_given = enumerate(pieces), 0, 0
        try:
            while running or num_given < len(sizes):
                (finished,), _ = ray.wait([*running, *starting], num_returns=1)
                if finished in starting:
                    actor = starting.pop(finished)
                    ray.get(finished)
                else:
                    at, actor = running.pop(finished)
                    found = ray.get(finished)
                    if isinstance(found, UserError):
                        raise found
                    done += sizes[at]
                    self.progress(done, sum(sizes))
                    yield at, found
                following = next(todo, None)
                if following is not None:
                    running[actor.encode.remote(following[1])] = (following[0], actor)
                    num_given += 1
        finally:
            for actor in actors:
                ray.kill(actor)


def worker_of(config: EncodeWorkers) -> Bundle:
    """What a worker asks for."""
    return {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}


def workers_that_fit(nodes: Sequence[Mapping[str, float]], config: EncodeWorkers) -> int:
    """How many of the workers that are asked for the cluster has room for.

    Args:
        nodes: resources of each: a worker is on one.
        config: what a worker asks for.

    Raises:
        UserError: not even one.
    """
    asked = worker_of(config)
    room = sum(fitting(node, asked) for node in nodes)
    if room < 1:
        cpus, gpus = (max((node.get(k, 0.0) for node in nodes), default=0.0) for k in asked)
        raise UserError(
            f"codes.encode: a worker with cpus_per_worker={config.cpus_per_worker:g} and "
            f"gpus_per_worker={config.gpus_per_worker:g} fits on no node: none has more than "
            f"{cpus:g} CPUs and {gpus:g} GPUs; lower them, or raise items_per_task="
            f"{config.items_per_task} so that the run's own process looks codes up"
        )
    return min(room, config.num_workers)

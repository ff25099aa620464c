"""Ray workers that look codes up, for sets that would keep one process busy for too long."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import ray
import torch

from embedding.errors import UserError
from embedding.precision import exact_products
from multimodal.codes.config import EncodeWorkers
from multimodal.codes.residual_quantizer import CPU
from pipeline.cluster import Bundle, RaySession, fitting
from pipeline.codes.encode_items import CodeAssigner, Encoded, LookUp, Piece
from pipeline.devices import own_device
from pipeline.pieces import stream_pieces


def _assigner(look_up: LookUp, config: EncodeWorkers) -> Callable[[Piece], Encoded]:
    """Runs on a worker; what it returns looks a piece up."""
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    device = own_device() if config.gpus_per_worker else CPU
    assign = CodeAssigner.load(look_up, device)

    def encode(piece: Piece) -> Encoded:
        with exact_products():  # those in TF32 would propose too little
            return assign(piece)

    return encode


@dataclass(frozen=True)
class RayPieces:
    """`RunPieces` on the cluster of a command."""

    session: RaySession
    progress: Callable[[int, int], None]
    """Called with items done and in all."""

    def __call__(
        self, pieces: Iterator[Piece], sizes: Sequence[int], look_up: LookUp, config: EncodeWorkers
    ) -> Iterator[tuple[int, Encoded]]:
        """Numbers and codes of the pieces, as they are done.

        Raises:
            UserError: the cluster has no room for a worker, or a worker raised it.
        """
        asked = worker_of(config)
        self.session.wait_for("quantize", [asked])
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_workers = min(len(sizes), workers_that_fit(nodes, config))
        load = partial(_assigner, look_up, config)
        done = 0
        for at, found in stream_pieces(load, pieces, asked=asked, num_actors=num_workers):
            done += sizes[at]
            self.progress(done, sum(sizes))
            yield at, found


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

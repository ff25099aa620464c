"""Whether the machines that a group's ranks are on suit its plan. Needs a process group.

A plan takes ranks to share hosts in equal consecutive blocks; Ray packs them as it sees fit.
"""

import logging
import math
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import torch
import torch.distributed as dist

from embedding.errors import UserError
from embedding.planning.choices import GRID, TABLE_COLUMN_WISE, TABLE_ROW_WISE
from embedding.planning.host_memory import memory_of_this_machine
from embedding.planning.plan_description import PlanDescription
from pipeline.console import size

logger = logging.getLogger(__name__)

_WITHIN_HOST = (TABLE_ROW_WISE, TABLE_COLUMN_WISE, GRID)


class Place(NamedTuple):
    """Where a rank is."""

    node: str
    host_bytes: int
    """Memory of the node."""
    device_bytes: int | None = None
    """Of the rank's GPU; None: its tables are in the node's memory."""


def check_hosts(path: Path, device: torch.device) -> None:
    """Refuse on all ranks a plan that needs other machines than the ranks are on.

    Args:
        path: of the plan.
        device: of this rank.

    Raises:
        UserError: it says which.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return
    on_gpu = device.type == "cuda"
    gpu_bytes = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    # Outside of Ray, ranks are processes of machines that know nothing of nodes.
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else platform.node()
    places: list[Place] = [Place("", 0)] * world_size
    dist.all_gather_object(places, Place(node, memory_of_this_machine(), gpu_bytes))
    refuse_other_hosts(PlanDescription.model_validate_json(path.read_text()), places)


def refuse_other_hosts(plan: PlanDescription, places: Sequence[Place]) -> None:
    """Refuse a plan whose tables do not fit these machines or are cut over the ranks of others.

    Args:
        plan: of as many ranks as there are places.
        places: by rank.

    Raises:
        UserError: it says which.
    """
    per_host = plan.ranks_per_host or 1
    blocks = [places[start : start + per_host] for start in range(0, len(places), per_host)]
    counts = Counter(place.node for place in places)
    if any(len({place.node for place in block}) > 1 for block in blocks):
        found = (
            f"the plan is for {len(blocks)} hosts of {per_host} ranks, and Ray has put "
            f"{' + '.join(map(str, counts.values()))} ranks on {len(counts)} nodes"
        )
        within = [entry.table for entry in plan.tables if entry.sharding in _WITHIN_HOST]
        if within:
            raise UserError(
                f"{found}, where the tables {within}, cut over the ranks of a host, would lie on "
                "several; wait for free nodes and run the same command again, set "
                "cluster.num_workers to what fills equal nodes, or "
                f"embedding.sharding.ranks_per_host={math.gcd(*counts.values())}"
            )
        if dist.is_initialized() and dist.get_rank() == 0:
            logger.warning("%s: steps may take longer than planned", found)
    _refuse_too_little_memory(plan, places)


def _refuse_too_little_memory(plan: PlanDescription, places: Sequence[Place]) -> None:
    if plan.predicted is None:
        return
    needed: Counter[str] = Counter()
    for rank, (place, expected) in enumerate(zip(places, plan.predicted.ranks, strict=True)):
        own = sum(expected.bytes.values())
        needed[place.node] += sum(expected.host_bytes.values()) + (
            own if place.device_bytes is None else 0
        )
        if place.device_bytes is not None and own > place.device_bytes:
            _refuse(f"{size(own)} of the memory of rank {rank}'s GPU, which is", place.device_bytes)
    for place in places:
        if needed[place.node] > place.host_bytes:
            ranks = sum(other.node == place.node for other in places)
            _refuse(
                f"{size(needed[place.node])} of the memory of the node that Ray has put {ranks} "
                "ranks on, which is",
                place.host_bytes,
            )


def _refuse(needs: str, there_is: int) -> None:
    raise UserError(
        f"by the plan, tables need {needs} {size(there_is)}: use nodes of one kind, more of "
        "them, or smaller tables, or set embedding.sharding.ranks_per_host to the ranks that "
        "share a node"
    )

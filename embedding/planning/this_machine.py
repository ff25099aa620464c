"""The machine at hand: ranks of a host, its device, and memory. Imports torch to ask a GPU only."""

import logging
import os
import re

from embedding.config import ShardingConfig
from embedding.errors import UserError
from embedding.planning.cluster_shape import ClusterShape, find_machine, limited
from embedding.planning.host_memory import memory_of_this_machine
from embedding.planning.machines import MACHINES, Machine

logger = logging.getLogger(__name__)

LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
"""Environment variable from which TorchRec, at run time, learns how many ranks a host has."""


def ranks_per_host(sharding: ShardingConfig, world_size: int) -> int:
    """Ranks of one host: configured, else what the launcher says, else all of them.

    Raises:
        UserError: if it does not divide the world size.
    """
    reported = int(os.environ.get(LOCAL_WORLD_SIZE, world_size))
    ranks = sharding.ranks_per_host or (reported if world_size % reported == 0 else world_size)
    if world_size % ranks:
        raise UserError(
            f"ranks_per_host={ranks} does not divide the world size {world_size}; use a divisor"
        )
    return ranks


def local_shape(sharding: ShardingConfig, world_size: int, device: str) -> ClusterShape:
    """The cluster of a process group of such devices, with the memory they have."""
    ranks = ranks_per_host(sharding, world_size)
    machine = local_machine(device)
    shape = ClusterShape(machine=machine, num_hosts=world_size // ranks, ranks_per_host=ranks)
    return limited(shape, sharding.hbm_gib)


def local_machine(device: str) -> Machine:
    """The known machine with this device, and the memory that device and host have here.

    An unknown GPU is a guess.

    Args:
        device: torch's name of it.
    """
    if device == "cpu":
        machine = find_machine("cpu")
    else:
        import torch

        properties = torch.cuda.get_device_properties(device)
        machine = machine_of_gpu(properties.name, properties.total_memory)
    return machine.model_copy(update={"host_bytes": memory_of_this_machine()})


def machine_of_gpu(name: str, total_bytes: int) -> Machine:
    """The machine whose device calls itself `name`.

    A GPU that no data sheet here covers is taken for an A100 with its own memory: memory is what
    decides whether a plan fits, and a calibration replaces the rest.
    """
    # From the start of a word on: a GH200 is no H200. The longest name: an H100 NVL is no H100 SXM.
    found = [
        (len(part), machine)
        for machine in MACHINES
        for part in machine.device_names
        if re.search(rf"\b{re.escape(part)}", name)
    ]
    if found:
        _, nearest = max(found, key=lambda pair: pair[0])
        return nearest.model_copy(update={"hbm_bytes": total_bytes})
    logger.warning(
        "no data sheet here covers the GPU %r: it is planned for as an A100 with its memory; "
        "calibrate with `braid bench plan --calibrate`, or name a YAML topology",
        name,
    )
    source = f"a guess for {name}: the A100's data sheet, with its own memory"
    return find_machine("a100-80").model_copy(
        update={"name": name, "hbm_bytes": total_bytes, "source": source}
    )

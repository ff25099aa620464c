"""The machine a plan is made for: ranks, hosts, and memory per rank."""

import os

import torch
from torchrec.distributed import comm
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from embedding.config import ShardingConfig
from embedding.errors import UserError

GIB = 1 << 30
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


def use_hosts_of(num_ranks: int) -> None:
    """Make TorchRec's hierarchical sharding see hosts of `num_ranks` ranks.

    It learns the size from the environment, and keeps the process groups of the first size it saw.
    """
    previous = os.environ.get(LOCAL_WORLD_SIZE)
    os.environ[LOCAL_WORLD_SIZE] = str(num_ranks)
    if previous != str(num_ranks):
        comm._INTRA_PG = comm._CROSS_PG = None


def local_topology(sharding: ShardingConfig, world_size: int, device: torch.device) -> Topology:
    """The topology of the running process group, with the memory this device has."""
    ranks = ranks_per_host(sharding, world_size)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    device_bytes = host_bytes
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    if sharding.hbm_gib is not None:
        device_bytes = int(sharding.hbm_gib * GIB)
    return make_topology(
        device_type=device.type,
        world_size=world_size,
        ranks_per_host=ranks,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
    )


def make_topology(
    *,
    device_type: str,
    world_size: int,
    ranks_per_host: int,
    device_bytes: int,
    host_bytes: int,
) -> Topology:
    """A topology of any machine; bytes are per rank. On CPU the tables live in `device_bytes`."""
    on_cpu = device_type == "cpu"
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=world_size,
            local_world_size=ranks_per_host,
            hbm_cap_bytes=0 if on_cpu else device_bytes,
            ddr_cap_bytes=device_bytes if on_cpu else host_bytes,
        ),
        hardware_config=HardwareConfig(),
        kernel_config=KernelConfig(compute_device=device_type),
    )

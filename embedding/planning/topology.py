"""TorchRec's view of a cluster."""

import os

from torchrec.distributed import comm
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.this_machine import LOCAL_WORLD_SIZE


def use_hosts_of(num_ranks: int) -> None:
    """Make TorchRec's hierarchical sharding see hosts of `num_ranks` ranks.

    It learns the size from the environment, and keeps the process groups of the first size it saw.
    """
    previous = os.environ.get(LOCAL_WORLD_SIZE)
    os.environ[LOCAL_WORLD_SIZE] = str(num_ranks)
    if previous != str(num_ranks):
        comm._INTRA_PG = comm._CROSS_PG = None


def torchrec_topology(shape: ClusterShape) -> Topology:
    """TorchRec's description of a cluster, with its own default bandwidths."""
    on_cpu = shape.machine.device == "cpu"
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=shape.world_size,
            local_world_size=shape.ranks_per_host,
            hbm_cap_bytes=0 if on_cpu else shape.device_bytes,
            ddr_cap_bytes=shape.host_bytes_per_rank,
        ),
        hardware_config=HardwareConfig(),
        kernel_config=KernelConfig(compute_device=shape.machine.device),
    )

"""The Ray session of a command: the cluster it was submitted to, or a bounded local one."""

import logging
import math
import os
from typing import Self

from embedding.errors import UserError
from pipeline.config import ClusterConfig

OBJECT_STORE_BYTES = 1 << 30
# Ray replaces 127.0.0.1 by the address of a network card; the rest of 127.0.0.0/8 it leaves alone.
LOOPBACK = "127.0.0.2"


class RaySession:
    """Starts Ray when the first stage needs it, and stops it at the end of the command.

    With `RAY_ADDRESS` set (as in a submitted job) it connects to that cluster. Otherwise it starts
    a local one on loopback, without dashboard, with a bounded object store, and with as many CPUs
    as the training group asks for even where the machine has fewer.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def start(self) -> None:
        """Start or connect, once.

        Raises:
            UserError: The cluster has too few CPUs or GPUs for `cluster.num_workers`.
        """
        if self._started:
            return
        import ray

        # Ray's notices would push the run's own lines away; they stay in Ray's log files.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if "RAY_ADDRESS" in os.environ:
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        else:
            needed = math.ceil(self.cluster.num_workers * self.cluster.cpus_per_worker)
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, needed),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _node_ip_address=LOOPBACK,
            )
        self._started = True
        _quiet_ray()
        _check_resources(ray.cluster_resources(), self.cluster)


def _check_resources(resources: dict[str, float], cluster: ClusterConfig) -> None:
    needed = cluster.num_workers * cluster.cpus_per_worker
    if resources.get("CPU", 0) < needed:
        raise UserError(
            f"cluster.num_workers={cluster.num_workers} x cpus_per_worker="
            f"{cluster.cpus_per_worker} needs {needed:g} CPUs and the cluster has "
            f"{resources.get('CPU', 0):g}; lower one of them or add nodes"
        )
    if cluster.use_gpu and resources.get("GPU", 0) < cluster.num_workers:
        raise UserError(
            f"cluster.num_workers={cluster.num_workers} with use_gpu needs as many GPUs and the "
            f"cluster has {resources.get('GPU', 0):g}; lower num_workers or add nodes"
        )


def _quiet_ray() -> None:
    for name in ("ray.data", "ray.data._internal.progress", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)

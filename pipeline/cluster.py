"""The Ray session of a command: the cluster it was submitted to, or a bounded local one."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Self

from embedding.errors import UserError
from multimodal.content_config import Service
from pipeline.config import ClusterConfig, Recipe

OBJECT_STORE_BYTES = 1 << 30
# Ray replaces 127.0.0.1 by the address of a network card; the rest of 127.0.0.0/8 it leaves alone.
LOOPBACK = "127.0.0.2"
POLL_S = 15.0
"""Between two looks at a cluster that grows."""

Bundle = dict[str, float]
"""CPUs and GPUs of one actor."""

logger = logging.getLogger(__name__)


class RaySession:
    """Starts Ray when the first stage needs it, and stops it at the end of the command.

    With `RAY_ADDRESS` set (as in a submitted job) it connects to that cluster. Otherwise it starts
    a local one on loopback, without dashboard, with a bounded object store, and with as many CPUs
    as the training group asks for even where the machine has fewer.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        *,
        actors: Sequence[Bundle] = (),
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        """`actors`: what runs beside the ranks needs (`actors_of`)."""
        self.cluster = cluster
        self.actors = list(actors)
        self.say = say
        """Shows a line while the cluster grows."""
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
            UserError: The cluster has too few CPUs or GPUs for `cluster.num_workers`, and no
                autoscaler added them in time.
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
            needed = self.cluster.num_workers * self.cluster.cpus_per_worker
            needed += sum(actor["CPU"] for actor in self.actors)
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(needed)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                _node_ip_address=LOOPBACK,
            )
        self._started = True
        _quiet_ray()
        lacking = lacking_resources(ray.cluster_resources(), self.cluster, self.actors)
        if lacking is not None and self.cluster.autoscale_timeout_s is not None:
            lacking = self._grow(lacking, self.cluster.autoscale_timeout_s)
        if lacking is not None:
            raise UserError(f"{lacking}; {_remedy(self.cluster)}")

    def _grow(self, lacking: str | None, timeout_s: float) -> str | None:
        """Ask the autoscaler for the training group's nodes; what is lacking in the end."""
        import ray
        from ray.autoscaler.sdk import request_resources

        worker = {"CPU": self.cluster.cpus_per_worker} | (
            {"GPU": 1} if self.cluster.use_gpu else {}
        )
        started = time.monotonic()
        request_resources(bundles=[worker] * self.cluster.num_workers + self.actors)
        try:
            while lacking is not None and (waited_s := time.monotonic() - started) < timeout_s:
                self.say(f"  {lacking}; waiting for nodes ({waited_s:.0f} of {timeout_s:.0f} s)")
                time.sleep(min(POLL_S, timeout_s - waited_s))
                lacking = lacking_resources(ray.cluster_resources(), self.cluster, self.actors)
        finally:
            # A request stays until the next one: without this, idle nodes would never go away.
            request_resources(bundles=[])
        return lacking


def actors_of(recipe: Recipe) -> list[Bundle]:
    """What the actors that train beside the ranks ask for, one entry each."""
    if recipe.content is None or not isinstance(recipe.content.placement, Service):
        return []
    service = recipe.content.placement
    return [{"CPU": service.cpus_per_actor, "GPU": service.gpus_per_actor}] * service.num_actors


def lacking_resources(
    resources: dict[str, float], cluster: ClusterConfig, actors: Sequence[Bundle] = ()
) -> str | None:
    """What the training group needs and the cluster does not have; None: nothing."""
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    beside_cpus, beside_gpus = (sum(a[kind] for a in actors) for kind in ("CPU", "GPU"))
    needed = cluster.num_workers * cluster.cpus_per_worker
    if cpus < needed + beside_cpus:
        beside = f", and the content service {beside_cpus:g} more," if beside_cpus else ""
        return (
            f"cluster.num_workers={cluster.num_workers} x cpus_per_worker="
            f"{cluster.cpus_per_worker:g} needs {needed:g} CPUs{beside} and the cluster has "
            f"{cpus:g}"
        )
    if gpus < (cluster.num_workers if cluster.use_gpu else 0) + beside_gpus:
        service = f"the content service needs {beside_gpus:g} GPUs"
        if not cluster.use_gpu:
            return f"{service} and the cluster has {gpus:g}"
        beside = f", {service} more," if beside_gpus else ""
        return (
            f"cluster.num_workers={cluster.num_workers} with use_gpu needs as many GPUs{beside} "
            f"and the cluster has {gpus:g}"
        )
    return None


def _remedy(cluster: ClusterConfig) -> str:
    if cluster.autoscale_timeout_s is None:
        return (
            "lower num_workers, or add nodes; where an autoscaler adds them, set "
            "cluster.autoscale_timeout_s"
        )
    return (
        f"no node came within cluster.autoscale_timeout_s={cluster.autoscale_timeout_s:g}: see "
        "`ray status` for the reason, lower num_workers, or wait longer"
    )


def _quiet_ray() -> None:
    for name in ("ray.data", "ray.data._internal.progress", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""The Ray session of a command: the cluster it was submitted to, or a bounded local one."""

import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from embedding.errors import UserError
from multimodal.content_config import Service
from pipeline.config import ClusterConfig, Recipe

OBJECT_STORE_BYTES = 1 << 30
# Ray replaces 127.0.0.1 by the address of a network card; the rest of 127.0.0.0/8 it leaves alone.
LOOPBACK = "127.0.0.2"
POLL_S = 10.0
"""Between two looks at what is free; lines about it come at twice the interval each time."""
ENDED = "ended by SIGTERM"

Bundle = dict[str, float]
"""CPUs and GPUs of one process."""
ONE_CPU: Bundle = {"CPU": 1.0}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_ROUNDING = 1e-9
"""Of thirds of a GPU, say."""

logger = logging.getLogger(__name__)


def usable_cpus() -> int:
    """CPUs of this process: a container (its control group) may have fewer than its host."""
    found = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
    except (OSError, ValueError):
        return found
    return found if quota == "max" else min(found, math.ceil(int(quota) / int(period)))


@dataclass(frozen=True)
class Terms:
    """What a command calls what it asks a cluster for, in what it tells its user."""

    processes: str = "cluster.num_workers"
    cpus: str = "cpus_per_worker"
    autoscale: str = "cluster.autoscale_timeout_s"
    waiting: str = "cluster.wait_timeout_s, or autoscale_timeout_s"


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
        terms: Terms = Terms(),  # noqa: B008 # frozen
    ) -> None:
        """`actors`: what runs beside the ranks needs (`actors_of`)."""
        self.cluster = cluster
        self.terms = terms
        self.actors = list(actors)
        self.say = say
        """Shows a line while the command waits for the cluster."""
        self._started = False
        self._is_shared = False
        """Whether others may hold what this command needs."""
        self._own_node: Mapping[str, float] | None = None
        """What a local Ray has, once it is started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def start(self) -> None:
        """Start or connect, once.

        Raises:
            UserError: `RAY_ADDRESS` is not that of a cluster's own port, or the cluster has too few
                CPUs or GPUs for `cluster.num_workers` and is local, or has no autoscaler that would
                add them.
        """
        if self._started:
            return
        address = cluster_address()
        import ray

        # Ray's notices would push the run's own lines away; they stay in Ray's log files.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with _sigterm_interrupts():
            if address is not None:
                ray.init(logging_level=logging.WARNING, log_to_driver=False)
            else:
                needed = self.cluster.num_workers * self.cluster.cpus_per_worker
                needed += sum(actor["CPU"] for actor in self.actors)
                ray.init(
                    address="local",
                    num_cpus=max(usable_cpus(), math.ceil(needed)),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                    _node_ip_address=LOOPBACK,
                )
        self._started = True
        self._is_shared = address is not None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not self._is_shared:
            (self._own_node,) = nodes
        terms = self.terms
        lacking = lacking_resources(nodes, self.cluster, self.actors, terms)
        if lacking is None:
            return
        if not self._is_shared:
            raise UserError(
                f"{lacking}: a local one that this command has started, as RAY_ADDRESS is not set; "
                "run it on the cluster (RAY_ADDRESS, or `ray job submit`), or ask for less"
            )
        # An autoscaler adds nodes when a stage waits for them: GPUs are not there for ingest.
        if self.cluster.autoscale_timeout_s is None:
            raise UserError(
                f"{lacking}; lower {terms.processes.removeprefix('cluster.')}, or add nodes; where "
                f"an autoscaler adds them, set {terms.autoscale}"
            )

    def group(self) -> list[Bundle]:
        """What the training group needs: its ranks and the actors beside them."""
        return rank_bundles(self.cluster) + self.actors

    def wait_for(self, who: str, bundles: Sequence[Bundle]) -> None:
        """Start, and wait until all of this is free at once: others may hold it for hours.

        It is not kept: whoever was waited for asks for it next.

        Args:
            who: what the lines and the error speak of.
            bundles: CPUs and GPUs of each process.

        Raises:
            UserError: as `start`; or it was not free within `cluster.wait_timeout_s`; or a local
                Ray has no room for one of the processes.
        """
        self.start()
        if self._is_shared:
            autoscale_s = self.cluster.autoscale_timeout_s or 0.0
            self._await(who, bundles, max(self.cluster.wait_timeout_s, autoscale_s))
        elif self._own_node is not None:
            _require_room(who, bundles, self._own_node)

    def _await(self, who: str, bundles: Sequence[Bundle], timeout_s: float) -> None:
        # A placement group says when its bundles fit on nodes, an autoscaler launches nodes for it
        # and keeps them, and it ends with this job; a request to the autoscaler does none of it.
        from ray.util import placement_group, remove_placement_group

        asked = [kinds for bundle in bundles if (kinds := {k: v for k, v in bundle.items() if v})]
        if not asked:
            return
        started, next_line_s = time.monotonic(), 0.0
        group = placement_group(asked)
        try:
            while not group.wait(timeout_seconds=POLL_S):
                waited_s = time.monotonic() - started
                state = f"{who} waits for {listed(asked)}, and {free_now()} are free"
                if waited_s >= timeout_s:
                    raise UserError(
                        f"{state} after {timeout_s:g} s ({self.terms.waiting}); see `ray status` "
                        "for who holds the rest or why no node came, ask for less "
                        f"({self.terms.processes}, {self.terms.cpus}), or wait longer"
                    )
                if waited_s >= next_line_s:
                    self.say(f"  {state} ({waited_s:.0f} of {timeout_s:.0f} s)")
                    next_line_s = 2 * waited_s
        finally:
            remove_placement_group(group)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Around the start of Ray: during it and from then on SIGTERM is what ctrl-C is.

    `ray job stop` and whatever supervises a command send it. Ray sets a handler that ends the
    process as if a stage had failed, with the signal's number as its exit code.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise KeyboardInterrupt(ENDED) from ended
        raise
    if threading.current_thread() is threading.main_thread():  # Ray sets its own there only, too
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(ENDED)


def cluster_address() -> str | None:
    """The cluster that `RAY_ADDRESS` names; None: a local one is started.

    Raises:
        UserError: it is an address that a command cannot work through.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return None
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address} is the address of Ray Client or of the dashboard, and stages "
            "need the cluster itself; submit the command as a job (`ray job submit --address "
            "http://... -- braid ...`), or run it on a node with RAY_ADDRESS=auto"
        )
    return address


def require_absolute(paths: Mapping[str, Path]) -> None:
    """On a cluster, processes have working directories of their own.

    Args:
        paths: by the option that gives them.

    Raises:
        UserError: `RAY_ADDRESS` is set, and one of them is relative.
    """
    if cluster_address() is None:
        return
    for option, path in paths.items():
        if not path.is_absolute():
            raise UserError(
                f"{option}={path} is relative, and with RAY_ADDRESS set the processes of a cluster "
                "would each look below another directory; give the absolute path of a directory "
                "that all nodes share"
            )


def worker_bundle(cluster: ClusterConfig) -> Bundle:
    """What a rank asks for."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1.0} if cluster.use_gpu else {})


def rank_bundles(cluster: ClusterConfig) -> list[Bundle]:
    """What all ranks ask for, one entry each."""
    return [worker_bundle(cluster)] * cluster.num_workers


def actors_of(recipe: Recipe) -> list[Bundle]:
    """What the actors that train beside the ranks ask for, one entry each."""
    if recipe.content is None or not isinstance(recipe.content.placement, Service):
        return []
    service = recipe.content.placement
    return [{"CPU": service.cpus_per_actor, "GPU": service.gpus_per_actor}] * service.num_actors


def lacking_resources(
    nodes: Sequence[Mapping[str, float]],
    cluster: ClusterConfig,
    actors: Sequence[Bundle] = (),
    terms: Terms = Terms(),  # noqa: B008 # frozen
) -> str | None:
    """What the training group needs and the cluster does not have; None: nothing.

    Args:
        nodes: resources of each; a rank is on one of them.
        cluster: the ranks.
        actors: what runs beside them.
        terms: what the user calls both.
    """
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    beside_cpus, beside_gpus = (sum(a[kind] for a in actors) for kind in ("CPU", "GPU"))
    needed = cluster.num_workers * cluster.cpus_per_worker
    ranks = f"{terms.processes}={cluster.num_workers}"
    if cpus < needed + beside_cpus:
        beside = f", and the content service {beside_cpus:g} more," if beside_cpus else ""
        return (
            f"{ranks} x {terms.cpus}={cluster.cpus_per_worker:g} needs {needed:g} CPUs{beside} "
            f"and the cluster has {cpus:g}"
        )
    if gpus < (cluster.num_workers if cluster.use_gpu else 0) + beside_gpus:
        service = f"the content service needs {beside_gpus:g} GPUs"
        if not cluster.use_gpu:
            return f"{service} and the cluster has {gpus:g}"
        beside = f", {service} more," if beside_gpus else ""
        return f"{ranks} with use_gpu needs as many GPUs{beside} and the cluster has {gpus:g}"
    asked = worker_bundle(cluster)
    room = sum(fitting(node, asked) for node in nodes)
    if room < cluster.num_workers:
        return (
            f"{ranks} needs {listed([asked])} on a node for each, and the {len(nodes)} nodes of "
            f"the cluster have room for {room}"
        )
    return None


def fitting(node: Mapping[str, float], asked: Bundle) -> int:
    """Processes that a node has room for."""
    return min(
        math.floor(node.get(kind, 0.0) / each + _ROUNDING) for kind, each in asked.items() if each
    )


def room_for(asked: Bundle) -> float:
    """Processes that the nodes of the cluster have room for, if nobody else held any of it."""
    import ray

    if not any(asked.values()):
        return math.inf
    return sum(fitting(node["Resources"], asked) for node in ray.nodes() if node["Alive"])


def _require_room(who: str, bundles: Sequence[Bundle], node: Mapping[str, float]) -> None:
    for bundle in bundles:
        if any(bundle.values()) and not fitting(node, bundle):
            raise UserError(
                f"{who} asks for {listed([bundle])} for a process, and the local Ray that this "
                f"command has started has {node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} "
                "GPU; ask for less in that section of the recipe (cpus_per_worker, "
                "gpus_per_worker), or run on a cluster (RAY_ADDRESS, or `ray job submit`)"
            )


def listed(bundles: Sequence[Bundle]) -> str:
    """As 2 x (1 CPU, 1 GPU) + 1 CPU."""
    counts = Counter(
        ", ".join(f"{each:g} {kind}" for kind, each in bundle.items()) for bundle in bundles
    )
    return " + ".join(
        text if count == 1 else f"{count} x ({text})" for text, count in counts.items()
    )


def free_now(kinds: Iterable[str] = ("CPU", "GPU")) -> str:
    """As `2 of 8 CPUs and 0 of 1 GPUs`, of the kinds there are; needs an initialised Ray."""
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    shown = [kind for kind in kinds if kind == "CPU" or total.get(kind)]
    return " and ".join(f"{free.get(k, 0.0):g} of {total.get(k, 0.0):g} {k}s" for k in shown)

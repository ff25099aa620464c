"""Runs a function on every rank of a Ray Train worker group."""

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
)

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.memory import WORKER_ENVIRONMENT
from pipeline.cluster import cluster_address, free_now, worker_bundle
from pipeline.config import ClusterConfig

_RAY_TRAIN = {
    # Ray looks every 2 s whether the ranks are done; a small day's stages take little longer.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A process more for every group; a node that is taken away ends ranks, and they restart.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Defaults of the environment that Ray Train reads."""
_NO_ROOM = (InsufficientClusterResourcesError, WorkerGroupStartupTimeoutError)
START_S = 60.0
"""Ray Train waits so long for the resources of a group, and then begins to wait anew."""
MIN_START_S = 300.0
"""A group waits at least so long in all: an aborted one frees its resources within minutes."""
Worker = Callable[[dict[str, str]], None]
"""Runs on every rank with `{"job": JSON}`."""
RunWorkers = Callable[[Worker, StrictConfig, ClusterConfig, Path], None]
"""Runs a worker with a job on all ranks of a cluster; the path is scratch space."""


class WorkerGroupTrainer(TorchTrainer):
    """Ray Train's trainer without what a group here has no use for.

    Each of the callbacks left out starts a process, which costs seconds of a CPU.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = (DatasetsCallback,)  # ranks read their samples by themselves
        if cluster_address() is None:
            # Frees what a dead controller held; a local cluster ends with the command.
            unused += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unused)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """None: an interrupt is Python's own, and the end of the Ray session kills the group.

        Ray Train's handler stays when the training is over. It ignores two interrupts, ends the
        command at the third with code 0, and may take 20 s.
        """


def run_workers(worker: Worker, job: StrictConfig, cluster: ClusterConfig, scratch: Path) -> None:
    """Run `worker({"job": JSON})` on every rank of a Ray Train worker group.

    Raises:
        UserError: The cluster had no room for the group all the time it waited for it.
        ray.train.TrainingFailedError: The group failed more often than `cluster.max_failures`.
    """
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    storage = scratch / ".ray_train"
    trainer = WorkerGroupTrainer(
        worker,
        train_loop_config={"job": job.model_dump_json()},
        # gloo beside NCCL: checkpoints and metrics are reduced on the CPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=worker_bundle(cluster),
        ),
        run_config=RunConfig(
            name="workers",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=_starts(cluster)
            ),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, _NO_ROOM):
            raise UserError(_no_room(cluster)) from error
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _starts(cluster: ClusterConfig) -> int:
    """Failed starts of a group that are forgiven; Ray Train counts those of all its restarts."""
    return math.ceil(max(cluster.autoscale_timeout_s or 0.0, MIN_START_S) / START_S)


def _no_room(cluster: ClusterConfig) -> str:
    """What a group that did not start needs, what there is, and what to do."""
    needed = worker_bundle(cluster)
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
    return (
        f"the cluster had no room for a group of cluster.num_workers={cluster.num_workers} workers "
        f"with {each} each, in {_starts(cluster) + 1} attempts; now {free_now(needed)} are free, "
        "perhaps not together on one node: wait for the jobs that hold the rest (`ray status` "
        "shows what is in use) and run the same command again, lower cluster.num_workers, or add "
        "nodes; where an autoscaler adds them, set cluster.autoscale_timeout_s"
    )

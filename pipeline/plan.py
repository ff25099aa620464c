"""The plan stage: where every table's shards go, for the cluster this run will train on.

Reads the recipe and the cluster's resources; writes `plan.json`, which training takes as input.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import ray

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import file_sha256
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.machines import Machine
from embedding.planning.plan_description import PlanDescription
from pipeline.artifacts import StageFacts
from pipeline.cluster import fitting, worker_bundle
from pipeline.config import ClusterConfig, Recipe
from pipeline.stages import StageOutput

PLAN = "plan.json"
_MEMORY_TOLERANCE = 0.02
"""Two machines of one kind differ by less memory than this."""


class PlannedCluster(StrictConfig):
    """What a plan depends on of a cluster: hosts, their ranks, memory."""

    topology: str
    device_bytes: int
    host_bytes: int

    @classmethod
    def of(cls, shape: ClusterShape) -> Self:
        """Those of a shape."""
        return cls(
            topology=shape.name,
            device_bytes=shape.device_bytes,
            host_bytes=shape.host_bytes_per_rank * shape.ranks_per_host,
        )

    def is_like(self, other: "PlannedCluster") -> bool:
        """Whether a plan for the other one suits it."""
        memory = (self.device_bytes, other.device_bytes), (self.host_bytes, other.host_bytes)
        return self.topology == other.topology and all(
            math.isclose(*pair, rel_tol=_MEMORY_TOLERANCE) for pair in memory
        )


class PlanFacts(StageFacts):
    """What was planned, for which cluster."""

    ranks_per_host: int
    predicted_step_s: float
    constants: str
    """Where those of the prediction come from."""
    binding: str
    """What limits the plan, in a sentence."""
    cluster: PlannedCluster


def plan(recipe: Recipe, scratch: Path) -> StageOutput:
    """Plan in a Ray task on a machine of the kind that trains: it knows its device and memory.

    Raises:
        UserError: No plan fits the cluster, or a setting cannot run on its devices.
    """
    shape = training_shape(recipe)
    plan = PlanDescription.model_validate_json(_on_a_worker(_plan_tables, recipe))
    write_plan(plan, scratch)
    assert plan.predicted is not None
    rows = sum(
        max(shard.row_offset + shard.num_rows for shard in table.shards) for table in plan.tables
    )
    facts = PlanFacts(
        ranks_per_host=plan.ranks_per_host,
        predicted_step_s=plan.predicted.step_s,
        constants=plan.predicted.constants,
        binding=plan.predicted.binding,
        cluster=PlannedCluster.of(shape),
    )
    return StageOutput(rows, rows, facts)


def training_shape(recipe: Recipe) -> ClusterShape:
    """The cluster that `plan` plans for: the recipe's ranks, on the Ray cluster at hand."""
    return ClusterShape.model_validate_json(_on_a_worker(_training_shape, recipe))


def _on_a_worker(task: Callable[[Recipe, int], str], recipe: Recipe) -> str:
    """Run a task with the recipe and the ranks of a host where a worker could run."""
    ranks_per_host = recipe.embedding.sharding.ranks_per_host or hosts_ranks(recipe.cluster)
    remote = ray.remote(**_worker_options(recipe.cluster))(task)
    said: str = ray.get(remote.remote(recipe, ranks_per_host))
    return said


def _worker_options(cluster: ClusterConfig) -> dict[str, float]:
    """For `ray.remote` itself: only there do GPUs make a task's process end with it (max_calls)."""
    asked = worker_bundle(cluster)
    return {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0.0)}


def plan_inputs(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that the recipe's plan is made from.

    Not their times: a job's working directory is unpacked anew after every change of code, and all
    that was trained with the plan would be trained again.
    """
    sharding = recipe.embedding.sharding
    files = {
        "plan": sharding.plan,
        "calibration": sharding.calibration,
        "traffic": sharding.traffic,
    }
    return {
        name: file_sha256(path)
        for name, path in files.items()
        if path is not None and path.is_file()
    }


def write_plan(plan: PlanDescription, scratch: Path) -> None:
    """The file of a plan artifact."""
    (scratch / PLAN).write_text(plan.model_dump_json(indent=2))


def hosts_ranks(cluster: ClusterConfig) -> int:
    """Ranks that share a host: as many as the smallest usable node holds, dividing the group."""
    return ranks_per_host(cluster.num_workers, min(_slots(cluster), default=1))


def _slots(cluster: ClusterConfig) -> list[int]:
    """Ranks that each usable node holds."""
    asked = worker_bundle(cluster)
    slots = (fitting(node["Resources"], asked) for node in ray.nodes() if node["Alive"])
    return [count for count in slots if count]


def ranks_per_host(num_workers: int, slots_per_host: int) -> int:
    """The largest divisor of the group that fits a host."""
    return max(
        n for n in range(1, num_workers + 1) if num_workers % n == 0 and n <= max(slots_per_host, 1)
    )


def present_shape(cluster: ClusterConfig) -> ClusterShape:
    """The whole Ray cluster this process is connected to: equal hosts of one device.

    Raises:
        UserError: No host of the cluster can hold a worker.
    """
    per_host = _slots(cluster)
    if not per_host:
        device = "GPUs" if cluster.use_gpu else "CPUs"
        raise UserError(
            f"no host of the Ray cluster has {device} for a worker; add nodes, or name a topology"
        )
    remote = ray.remote(**_worker_options(cluster))(_local_machine)
    machine = ray.get(remote.remote(cluster.use_gpu))
    return ClusterShape(
        machine=Machine.model_validate_json(machine),
        num_hosts=len(per_host),
        ranks_per_host=min(per_host),
    )


def gpu_name(cluster: ClusterConfig) -> str | None:
    """Name of the cluster's GPUs; None on CPU."""
    if not cluster.use_gpu:
        return None
    name: str = ray.get(ray.remote(num_gpus=1)(_gpu_name).remote())
    return name


def _gpu_name() -> str:
    """Runs in a Ray worker that has a GPU."""
    import torch

    return torch.cuda.get_device_name()


def _local_machine(use_gpu: bool) -> str:
    """Runs in a Ray worker: the machine it is on, as JSON."""
    from embedding.planning.this_machine import local_machine

    return local_machine("cuda" if use_gpu else "cpu").model_dump_json()


def _training_shape(recipe: Recipe, ranks_per_host: int) -> str:
    """Runs in a Ray worker: what the recipe trains on there, as JSON."""
    from pipeline.planning_worker import training_shape

    return training_shape(recipe, ranks_per_host).model_dump_json()


def _plan_tables(recipe: Recipe, ranks_per_host: int) -> str:
    """Runs in a Ray worker. Returns the plan as JSON."""
    from pipeline.planning_worker import plan_recipe

    return plan_recipe(recipe, ranks_per_host).model_dump_json()

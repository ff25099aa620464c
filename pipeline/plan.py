"""The plan stage: where every table's shards go, for the cluster this run will train on.

Reads the recipe and the cluster's resources; writes `plan.json`, which training takes as input.
"""

from pathlib import Path

import ray

from pipeline.config import ClusterConfig, Recipe
from pipeline.stages import StageOutput

PLAN = "plan.json"


def plan(recipe: Recipe, scratch: Path) -> StageOutput:
    """Plan in a Ray task on a machine of the kind that trains: torchrec stays out of the driver.

    Raises:
        UserError: No plan fits the cluster, or a setting cannot run on its devices.
    """
    ranks_per_host = recipe.embedding.sharding.ranks_per_host or hosts_ranks(recipe.cluster)
    task = ray.remote(_plan_tables).options(
        num_cpus=recipe.cluster.cpus_per_worker, num_gpus=1 if recipe.cluster.use_gpu else 0
    )
    text, rows = ray.get(task.remote(recipe, ranks_per_host))
    (scratch / PLAN).write_text(text)
    return StageOutput(rows_in=rows, rows_out=rows, facts={"ranks_per_host": ranks_per_host})


def hosts_ranks(cluster: ClusterConfig) -> int:
    """Ranks that share a host: as many as the smallest usable node holds, dividing the group."""
    per_node = []
    for node in ray.nodes():
        resources = node["Resources"]
        slots = (
            resources.get("GPU", 0)
            if cluster.use_gpu
            else resources.get("CPU", 0) / cluster.cpus_per_worker
        )
        if node["Alive"] and slots >= 1:
            per_node.append(int(slots))
    return ranks_per_host(cluster.num_workers, min(per_node, default=1))


def ranks_per_host(num_workers: int, slots_per_host: int) -> int:
    """The largest divisor of the group that fits a host."""
    return max(
        n for n in range(1, num_workers + 1) if num_workers % n == 0 and n <= max(slots_per_host, 1)
    )


def _plan_tables(recipe: Recipe, ranks_per_host: int) -> tuple[str, int]:
    """Runs in a Ray worker. Returns the plan as JSON and the number of table rows."""
    from pipeline.planning_worker import plan_tables

    return plan_tables(recipe, ranks_per_host)

"""Planning inside a Ray worker, which asks the device what it is.

On CPUs without torch, unless the recipe has content.
"""

from dataclasses import replace

from embedding.limits import check_support
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.plan_description import PlanDescription, read_plan
from embedding.planning.planner import check_trainable, plan_tables
from embedding.planning.this_machine import local_shape
from pipeline.config import Recipe
from pipeline.planning.request import plan_request
from pipeline.planning.reserve import with_reserve


def training_shape(recipe: Recipe, ranks_per_host: int) -> ClusterShape:
    """The ranks that train the recipe, with the memory that this machine has or the recipe sets."""
    device = "cuda" if recipe.cluster.use_gpu else "cpu"
    sharding = recipe.embedding.sharding.model_copy(update={"ranks_per_host": ranks_per_host})
    return local_shape(sharding, recipe.cluster.num_workers, device)


def plan_recipe(recipe: Recipe, ranks_per_host: int) -> PlanDescription:
    """The plan for the ranks that train the recipe; a given one is checked against them.

    Raises:
        UserError: No plan fits, the given one is for other tables, or a setting cannot run here.
    """
    sharding = recipe.embedding.sharding
    request = plan_request(recipe, training_shape(recipe, ranks_per_host))
    device = request.shape.machine.device
    check_support(request.schema, recipe.embedding.optimizer, sharding, device)
    request = with_reserve(request, recipe)
    if sharding.plan is None:
        return plan_tables(request)
    given = read_plan(sharding.plan)
    check_trainable(given, request.schema)
    return plan_tables(replace(request, pinned=given))

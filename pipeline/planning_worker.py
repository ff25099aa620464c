"""Planning inside a Ray worker, where torch may be imported: it asks the device what it is."""

from dataclasses import replace

import torch

from embedding.limits import check_support
from embedding.plan_description import PlanDescription, read_plan
from embedding.planning import check_trainable, plan_tables
from embedding.topology import local_shape
from pipeline.config import Recipe
from pipeline.plan_request import plan_request


def plan_recipe(recipe: Recipe, ranks_per_host: int) -> PlanDescription:
    """The plan for the cluster that this process is part of; a given one is checked against it.

    Raises:
        UserError: No plan fits, the given one is for other tables, or a setting cannot run here.
    """
    device = torch.device("cuda" if recipe.cluster.use_gpu else "cpu")
    sharding = recipe.embedding.sharding.model_copy(update={"ranks_per_host": ranks_per_host})
    request = plan_request(recipe, local_shape(sharding, recipe.cluster.num_workers, device))
    check_support(request.schema, recipe.embedding.optimizer, sharding, device.type)
    if sharding.plan is None:
        return plan_tables(request)
    given = read_plan(sharding.plan)
    check_trainable(given, request.schema)
    return plan_tables(replace(request, pinned=given))

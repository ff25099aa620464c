"""TorchRec's own plan of a recipe's tables, to compare with ours. Loads torch and torchrec."""

import logging

import torch

from embedding.planning.plan import describe_plan, torchrec_plan
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest
from embedding.planning.sharders import make_sharders
from embedding.planning.topology import torchrec_topology
from embedding.shard import declare_optimizer
from pipeline.config import Recipe
from ranking.model import RankingModel, RankingStep


def torchrec_plan_of(recipe: Recipe, request: PlanRequest) -> PlanDescription:
    """The plan of TorchRec's planner with its defaults, for the same tables and memory.

    Raises:
        UserError: It finds none.
    """
    meta = torch.device("meta")
    with meta:
        ranking = RankingModel(recipe.features, recipe.ranking, tables_device=meta)
        model = RankingStep(ranking, recipe.ranking)
    # Its storage estimate counts the states of the optimizer it finds on the parameters.
    declare_optimizer(model.tables, recipe.embedding.optimizer)
    # Its notices, a line a table, go to the root logger.
    logging.disable(logging.WARNING)
    try:
        plan = torchrec_plan(
            model,
            make_sharders(recipe.embedding.sharding, request.shape.machine.device),
            request.loads(),
            torchrec_topology(request.shape),
            request.settings.batch_size_per_rank,
        )
    finally:
        logging.disable(logging.NOTSET)
    shape = request.shape
    return describe_plan(plan, model.tables.schema, shape.world_size, shape.machine.device)

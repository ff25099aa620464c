"""Planning inside a Ray worker, where torchrec may be imported."""

import torch

from embedding.limits import check_support
from embedding.plan import describe_plan, make_plan
from embedding.sharders import make_sharders
from embedding.topology import local_topology
from pipeline.config import Recipe
from ranking.model import RankingModel, RankingStep


def plan_tables(recipe: Recipe, ranks_per_host: int) -> tuple[str, int]:
    """The plan as JSON and the number of table rows; tables are built on meta only."""
    device = torch.device("cuda" if recipe.cluster.use_gpu else "cpu")
    sharding = recipe.embedding.sharding.model_copy(update={"ranks_per_host": ranks_per_host})
    # The plan names collections by their path in the module that is sharded, so plan on that one.
    with torch.device("meta"):
        ranking = RankingModel(recipe.features, recipe.ranking, tables_device=torch.device("meta"))
        model = RankingStep(ranking, recipe.ranking)
    schema = model.tables.schema
    check_support(schema, recipe.embedding.optimizer, sharding, device.type)
    world_size = recipe.cluster.num_workers
    plan = make_plan(
        model,
        make_sharders(sharding, device.type),
        schema,
        local_topology(sharding, world_size, device),
        recipe.ranking.trainer.batch_size_per_rank,
    )
    described = describe_plan(plan, schema, world_size, device.type)
    rows = sum(table.num_embeddings for table in schema.tables)
    return described.model_dump_json(indent=2), rows

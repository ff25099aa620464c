"""Cost of the content part of a step, taken once a study from the recipe's own towers.

Torch and transformers are imported here: workers only.
"""

from pathlib import Path

import torch

from embedding.planning.traffic import Traffic
from multimodal.cic import CicLoss
from multimodal.content_config import ContentConfig
from multimodal.content_cost import CicCost
from multimodal.content_timing import cic_cost, encoder_cost
from pipeline.capacity.item_load import item_load
from pipeline.capacity.types import ContentCost
from pipeline.config import Recipe
from pipeline.content.training import content_penalty
from pipeline.samples.contract import open_parquet

_ITEMS = "items.parquet"


def content_cost(
    recipe: Recipe, content: ContentConfig, traffic: Traffic | None, *, timed: bool = True
) -> ContentCost:
    """What a recipe's content costs.

    Args:
        recipe: the recipe.
        content: its content.
        traffic: measured lookups of its items.
        timed: whether to time it on this CPU too; else all seconds are 0.

    Raises:
        UserError: a tower cannot be loaded, or nothing says how many items there are.
    """
    with torch.random.fork_rng(devices=()):  # a training of this process draws what it drew before
        return ContentCost(
            encoder=encoder_cost(content, timed=timed),
            cic=_cic_cost(recipe, timed=timed),
            items=item_load(content, recipe.features, traffic, _num_items(recipe.data.root)),
        )


def _cic_cost(recipe: Recipe, *, timed: bool) -> CicCost | None:
    penalty = content_penalty(recipe)
    if penalty is None:
        return None
    assert isinstance(penalty.loss, CicLoss)
    return cic_cost(penalty.loss, timed=timed)


def _num_items(root: Path) -> int | None:
    """Rows of the catalogue; None where it is not on this machine."""
    path = root / _ITEMS
    if not path.is_file():
        return None
    with open_parquet(path) as file:
        return file.metadata.num_rows or None

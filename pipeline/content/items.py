"""How a recipe's content reaches the items of samples and the model: no tower is needed for it."""

import torch

from embedding.feature_schema import FeatureSchema
from embedding.item_columns import item_sequences
from embedding.items import ItemIndex, ItemSource
from multimodal.content_config import ContentConfig
from ranking.content import ContentShape


def item_source(config: ContentConfig, schema: FeatureSchema, item_ids: torch.Tensor) -> ItemSource:
    """How a loader finds store rows; `item_ids`: raw id of every row."""
    histories = item_sequences(schema) if config.in_history else {}
    return ItemSource(ItemIndex(item_ids), histories)


def content_shape(config: ContentConfig, schema: FeatureSchema) -> ContentShape:
    """What the model reads."""
    return ContentShape(config.dim, tuple(item_sequences(schema) if config.in_history else ()))

"""Item content on a training or predicting rank: stored tokens, the encoder, what the ranker reads.

Torch is imported here: workers only.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from embedding.item_columns import candidate_field
from embedding.items import ItemSource
from multimodal.cic import CicLoss
from multimodal.content_bank import ContentBank
from multimodal.content_config import ContentConfig, Inline
from multimodal.content_encoder import load_content_encoder, standardise_on_ranks
from multimodal.content_head import ContentHead
from multimodal.content_learner import ContentLearner
from multimodal.content_source import EncoderPlacement, TrainedContent
from multimodal.inline_encoder import InlineEncoder
from multimodal.rank_group import RankGroup
from multimodal.stored_content import ContentReader
from multimodal.tower_files import model_identities
from pipeline.config import Recipe
from pipeline.content.items import content_shape, item_source
from pipeline.content.paths import ContentPaths
from pipeline.content.service import ServiceEncoder
from ranking.compatibility import table_widths
from ranking.content import ContentPart, ContentPenalty, ContentShape


@dataclass(frozen=True)
class RankContent:
    """All that a rank needs to train on content, or to predict with it."""

    source: TrainedContent
    items: ItemSource
    """For the loader."""
    shape: ContentShape
    """For the model."""
    penalty: ContentPenalty | None

    @property
    def part(self) -> ContentPart:
        """For the training step."""
        return ContentPart(self.source, self.penalty)


def rank_content(
    recipe: Recipe, paths: ContentPaths | None, device: torch.device, *, predicts: bool = False
) -> RankContent | None:
    """The content of this rank; None if the recipe reads none. All ranks must call it.

    Args:
        recipe: the day's.
        paths: of the stored content.
        device: of the rank.
        predicts: nothing is trained, so the encoder runs on the ranks, in fp32, wherever and in
            whatever precision it was trained.

    Raises:
        UserError: a tower cannot be loaded, or is not the one whose tokens are stored.
    """
    config = recipe.content
    if config is None:
        return None
    if predicts:
        config = config.model_copy(update={"placement": Inline(), "precision": "fp32"})
    assert paths is not None
    reader = ContentReader(paths.index, paths.stores)
    reader.require_towers(config)
    models = model_identities(config.towers).values()
    ranks = RankGroup(dist.new_group())
    item_ids = torch.from_numpy(reader.item_ids_N.copy())
    items = item_source(config, recipe.features, item_ids)
    shape, penalty = content_shape(config, recipe.features), content_penalty(recipe)
    placement = _placement(config, paths, reader, ranks, device, predicts=predicts)
    try:
        head = ContentHead(placement.head(), config, ranks, device)
        bank = ContentBank(item_ids, head.width, device, tokens=reader.identity, models=models)
    except BaseException:
        placement.close(is_orderly=False)  # it may have started actors
        ranks.close(is_orderly=False)
        raise
    source = TrainedContent(config, placement, head=head, bank=bank, ranks=ranks)
    return RankContent(source, items, shape, penalty)


def content_penalty(recipe: Recipe) -> ContentPenalty | None:
    """The content-ID-contrastive loss, over the field that looks up the candidate's id."""
    config = recipe.content
    if config is None or config.cic is None:
        return None
    name = candidate_field(recipe.features)
    looked_up = table_widths(recipe.features, recipe.ranking.model)
    table = next(f.table for f in looked_up.sparse if f.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        loss = CicLoss(config.cic, config.dim, looked_up.table(table).embedding_dim)
    return ContentPenalty(loss, name)


def _placement(
    config: ContentConfig,
    paths: ContentPaths,
    reader: ContentReader,
    ranks: RankGroup,
    device: torch.device,
    *,
    predicts: bool,
) -> EncoderPlacement:
    if not isinstance(config.placement, Inline):
        return ServiceEncoder(config, paths, ranks, device)
    encoder = load_content_encoder(config)
    learner = ContentLearner(config, encoder, reader.read, device)
    if not predicts:
        standardise_on_ranks(encoder, reader.read, reader.num_items, config.seed, ranks)
    return InlineEncoder(learner, ranks)

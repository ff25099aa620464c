"""Logits of a model in bf16 tell rows apart as those in float32 do."""

import pytest
import torch

from embedding.tables import EmbeddedBatch
from ranking import classifier_config as config
from ranking.config import ModelConfig
from ranking.experts_config import (
    ExpertsConfig,
    MixtureOfExpertsConfig,
    ProgressiveExtractionConfig,
    SharedBottom,
)
from ranking.model import Ranker
from tests.ranking.test_classifiers import KINDS
from tests.ranking.test_fields import schema_of

ROWS = 4000
DIMS = (8, 8, 8, 8)


def distinct_logits(model: ModelConfig, *, autocast: bool) -> int:
    torch.manual_seed(0)
    ranker = Ranker(schema_of(*DIMS), model, num_tasks=1, autocast=autocast)
    embedded = EmbeddedBatch(
        fields_BD=torch.randn(ROWS, sum(DIMS)),
        field_names=tuple(f"f{i}" for i in range(len(DIMS))),
        field_dims=DIMS,
        sequences={},
        lengths={},
    )
    with torch.no_grad():
        logits_BT = ranker(embedded, torch.zeros(ROWS, 0))
    assert logits_BT.dtype == torch.float32
    return len(logits_BT.unique())


def check(model: ModelConfig) -> None:
    exact, rounded = (distinct_logits(model, autocast=autocast) for autocast in (False, True))
    assert exact > 0.99 * ROWS
    assert rounded > 0.95 * exact


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bf16_logits_of_a_linear_head_are_not_rounded(kind: type[config.Classifier]) -> None:
    check(ModelConfig(classifier=kind()))


@pytest.mark.parametrize(
    "experts", [SharedBottom(), MixtureOfExpertsConfig(), ProgressiveExtractionConfig()]
)
def test_bf16_logits_of_towers_are_not_rounded(experts: ExpertsConfig) -> None:
    check(ModelConfig(classifier=config.Dnn(), experts=experts))

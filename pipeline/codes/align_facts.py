"""What the align stage did, in figures; imports nothing heavy."""

from typing import Literal

from pydantic import Field

from embedding.config import StrictConfig
from pipeline.artifacts import StageFacts
from pipeline.content.facts import ContentFacts

PairSample = tuple[tuple[int, int, float], ...]
"""Two items and their similarity."""


class PairFacts(StrictConfig):
    """What was mined; version 1."""

    schema_version: Literal[1] = 1
    first_day: str
    last_day: str
    num_positives: int
    num_users: int
    num_cut_users: int
    """Users whose item list was sampled."""
    num_cut_items: int
    """Items whose user list was sampled."""
    item2item_pairs: int
    item2item_items: int
    """Items with at least one neighbour."""
    user2item_pairs: int
    user2item_without: dict[str, int]
    """Positives without a trigger, by reason."""
    id_space: Literal["ranker", "factorisation"] | None = None
    """What user2item pairs are alike by: the item table of the ranker that the run started from, or
    a factorisation of positives; None: such pairs were not asked for."""
    examples: tuple[tuple[int, int, float], ...]
    """Most similar item2item pairs: item, neighbour, similarity."""
    samples: dict[str, PairSample] = Field(default_factory=dict)
    """By source, drawn by a hash of the two items: (item, neighbour) or (trigger, target), and
    their similarity."""


class AlignmentResult(StrictConfig):
    """Rank 0's account of a training; version 1."""

    schema_version: Literal[1] = 1
    steps: int
    first_loss: float
    """Mean of the first tenth of the steps."""
    last_loss: float
    """Mean of the last tenth."""
    temperature: float
    seconds: float
    num_pairs: dict[str, int] = Field(default_factory=dict)
    """By source: pairs whose items both have content."""


class AlignFacts(StageFacts):
    """What the stage did; version 1."""

    schema_version: Literal[1] = 1
    encoder: str
    """Identity of the encoder: equal ones make equal vectors."""
    trained_on: str | None
    """Last day whose pairs it was trained on; None: not trained."""
    num_items: int
    """With a vector."""
    num_without_content: int
    num_encoded: int
    """The others kept the vectors of the run before."""
    pairs: PairFacts | None
    training: AlignmentResult | None
    content: ContentFacts
    settings: str
    """Hash of `align_stage.alignment_settings`."""
    previous: str | None
    """Date of the run whose vectors these go on with."""

"""What the content stage counts; imports nothing heavy."""

from typing import Literal

from embedding.config import StrictConfig
from pipeline.artifacts import StageFacts


class ModalityFacts(StrictConfig):
    """Content of one modality."""

    num_present: int
    """Items with tokens."""
    faults: dict[str, int]
    """Items without, by cause."""
    num_cut: int
    """Texts that go on beyond `max_tokens`."""
    num_computed: int
    """Items encoded by this run; the tokens of the others were there."""
    stored_mib: float
    """Of all parts that the index points to."""


class ContentFacts(StageFacts):
    """What the stage did; version 1."""

    schema_version: Literal[1] = 1
    num_items: int
    num_without_content: int
    """Items with neither text nor image: their vector is a learned one."""
    modalities: dict[str, ModalityFacts]

"""What the quantize stage did with the items of a day."""

from typing import Any, Literal

from multimodal.codes.figures import CodeMetrics, Drift, RefitDecision, Stability
from pipeline.artifacts import StageFacts

COLLAPSED_COSINE = 0.9
"""Mean cosine of two items from which on vectors hardly tell items apart."""


class Quantized(StageFacts):
    """What became of the vectors of a day; version 1."""

    schema_version: Literal[1] = 1
    version: str
    """Codebooks that the codes belong to."""
    codebooks: str
    """Version and fingerprint: equal for equal codebooks only."""
    refit: RefitDecision
    drift: Drift | None
    """None on the first day and after a change of encoder."""
    num_items: int
    num_unseen_items: int
    """Of these: items that no codebook may be fitted to yet."""
    num_new_items: int
    """The other items that the codebooks were not fitted to."""
    table_sizes: dict[str, int]
    """Codes by column."""
    metrics: CodeMetrics | None
    """Of the RQ codes; None without."""
    stability: Stability | None
    """Codes of this day against those of the day before."""
    num_sharing_suffix: int
    """Items that no suffix could tell apart."""
    mean_cosine: float | None
    """Of two items that codebooks may be fitted to."""
    num_encoded: int | None
    """Items whose codes were looked up: the vectors of the others are those of the run before, and
    so are the codebooks. None: not by this run."""


class QuantizeFacts(Quantized):
    """What the stage did."""

    previous: str | None
    """Date of the run whose codes these go on with."""
    num_without_vector: int
    """Items of the catalogue that have no codes."""
    settings: dict[str, Any]
    """What `Codes.shared` was."""
    taken_from: str | None
    """The directory whose codes these are; None for codes of its own."""


def collapse_warning(mean_cosine: float | None) -> str | None:
    """A sentence where vectors point the same way; None where they do not."""
    if mean_cosine is None or mean_cosine < COLLAPSED_COSINE:
        return None
    return (
        f"item vectors hardly differ (mean cosine of two items {mean_cosine:.4f}): the encoder may "
        "have collapsed, or its vectors need their mean subtracted"
    )

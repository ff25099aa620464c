"""What the quantize stage did with the items of a day."""

from embedding.config import StrictConfig
from multimodal.code_metrics import CodeMetrics, Stability
from multimodal.codebook_refit import Drift, RefitDecision


class QuantizeFacts(StrictConfig):
    """What the stage did; version 1."""

    schema_version: int = 1
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

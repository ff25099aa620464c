"""Metrics of finished predictions, as they are kept; imports nothing heavy."""

from pydantic import BaseModel, ConfigDict


class ReliabilityBin(BaseModel):
    """Rows of similar prediction: how often the label was 1."""

    model_config = ConfigDict(frozen=True)

    num_rows: int
    mean_prediction: float
    label_rate: float


class SliceMetrics(BaseModel):
    """Metrics of one task on some rows; None where they are not defined."""

    model_config = ConfigDict(frozen=True)

    num_rows: int
    """Rows whose label is observed."""
    num_positives: int
    """Of these, rows whose label is 1. All that follows weighs each row by its weight."""
    label_rate: float | None = None
    auc: float | None = None
    """Weighted share of (positive, negative) pairs in the right order; ties count half."""
    gauc: float | None = None
    """AUC inside each group, averaged with the groups' impressions as weights. Groups of one class
    are left out and counted. Not torchrec's `gauc`, which is the unweighted mean."""
    gauc_num_groups: int = 0
    """Groups of both classes."""
    gauc_num_skipped_groups: int = 0
    logloss: float | None = None
    ne: float | None = None
    calibration: float | None = None
    """Sum of predictions / sum of labels."""


class TaskMetrics(SliceMetrics):
    """Metrics of one task, over all rows and by slice."""

    slices: dict[str, SliceMetrics] = {}
    reliability: list[ReliabilityBin] = []
    """Up to 20 bins of about equally many rows, for the calibration plot."""

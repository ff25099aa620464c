"""What a run took over from the checkpoint of another one; imports nothing heavy."""

from typing import Literal

from embedding.config import StrictConfig


class CarriedRows(StrictConfig):
    """What became of the rows of one table."""

    carried: int
    """Rows that go on with a saved row and its optimizer state."""
    sourced: int
    """Rows that start from the most similar saved row, with a new optimizer state."""
    redrawn: int
    """Rows that keep their start values."""


class WarmStartReport(StrictConfig):
    """What a warm start took from another run, on this rank's pieces; version 1."""

    schema_version: Literal[1] = 1
    carried: tuple[str, ...]
    """Tables, parameters and buffers whose values came from the checkpoint."""
    initialised: dict[str, str]
    """Tables, parameters and buffers that keep their start values, and why."""
    ignored: tuple[str, ...]
    """Saved tensors that this model has no place for."""
    dropped_ids: dict[str, int]
    """Managed-collision ids that found no room, by table, summed over ranks."""
    weights_only: tuple[str, ...] = ()
    """Tables among them that start with a new optimizer state: another optimizer trained them."""
    from_average: tuple[str, ...] = ()
    """Dense parameters and buffers that start from the average which the other run published, as
    this one keeps none."""
    rows: dict[str, CarriedRows] = {}
    """Tables whose rows have changed their meaning since they were saved."""

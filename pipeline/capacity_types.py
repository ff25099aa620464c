"""What a capacity study asks and answers, as data. Imports nothing heavy."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from embedding.cluster_shape import ClusterShape
from embedding.config import StrictConfig
from pipeline.config import Recipe

GPU_FLOPS_SHARE = 0.35
"""Share of the peak that the dense side's products are assumed to reach: small batches, many
layers that only move memory."""


class DenseCost(StrictConfig):
    """The dense side of a step, forward and backward, per row of a batch."""

    flops_per_row: NonNegativeFloat
    parameters: int
    """Trained dense values; their gradients are all-reduced."""
    cpu_seconds_per_row: NonNegativeFloat
    """Measured on one core of this machine."""
    precision: Literal["fp32", "bf16"]


class Target(StrictConfig):
    """What the cluster must do; without figures every cluster that fits does."""

    rows_per_s: PositiveFloat | None = None
    rows_per_day: PositiveFloat | None = None
    """Rows of one daily retraining."""
    window_hours: PositiveFloat = 4.0
    """Time that the retraining may take."""

    @property
    def needed_rows_per_s(self) -> float | None:
        """The larger of both demands."""
        daily = None if self.rows_per_day is None else self.rows_per_day / self.window_hours / 3600
        given = [value for value in (self.rows_per_s, daily) if value is not None]
        return max(given, default=None)


class CapacityRequest(StrictConfig):
    """A sweep."""

    recipe: Recipe
    shapes: tuple[ClusterShape, ...]
    batch_sizes: tuple[PositiveInt, ...]
    growth: tuple[PositiveFloat, ...] = (1.0,)
    """Factors of all tables' rows."""
    dim_factors: tuple[PositiveFloat, ...] = (1.0,)
    """Factors of all tables' dims, rounded to what the kernels allow."""
    target: Target = Target()
    traffic: Path | None = None
    calibrations: tuple[Path, ...] = ()
    """Each is used for the machine it was made on."""
    growth_per_day: NonNegativeFloat | None = None
    """Share of today's rows that every table gains a day, where traffic says nothing of it."""
    kernels: tuple[str, ...] = ("fused", "fused_uvm", "fused_uvm_caching")
    dense: DenseCost | None = None
    """None: taken from the recipe's model."""


class PointKey(StrictConfig):
    """One point of a sweep."""

    shape: ClusterShape
    batch_size_per_rank: int
    growth: float
    dim_factor: float


class CapacityPoint(StrictConfig):
    """What one cluster does with the tables."""

    topology: str
    machine: str
    world_size: int
    num_hosts: int
    batch_size_per_rank: int
    growth: float
    dim_factor: float
    table_bytes: int
    """Weights of all tables."""
    refusal: str | None = None
    """Why nothing fits; the figures below are None then."""
    constants: str | None = None
    shardings: dict[str, int] | None = None
    """Tables by sharding type and kernel."""
    step_s: float | None = None
    sparse_s: float | None = None
    dense_s: float | None = None
    hidden_s: float | None = None
    """Input exchange of the next batch that the dense side hides."""
    rows_per_s: float | None = None
    peak_bytes: int | None = None
    """Of the fullest rank, with the reserved share."""
    device_bytes: int | None = None
    headroom: float | None = None
    """Free share of the fullest rank's memory."""
    host_bytes: int | None = None
    """Of the fullest host: tables that do not live on its devices."""
    binding: str | None = None
    offloads_at_growth: float | None = None
    """Factor of these tables' rows from which device memory alone does not hold them."""
    breaks_first: str | None = None
    """What no longer fits when the tables grow."""
    breaks_at_growth: float | None = None
    """Factor of these tables' rows at which no plan fits; None if even a thousandfold does."""
    days_left: float | None = None
    """Until then, at today's growth."""
    cost_per_billion_rows: float | None = None
    price_per_hour: float | None = None
    search_s: float | None = None


class CapacityAnswer(StrictConfig):
    """What `braid capacity --json` writes; version 1."""

    schema_version: Literal[1] = 1
    recipe: str
    answer: str
    """The conclusion in a few sentences."""
    target: Target
    chosen: CapacityPoint | None
    dense: DenseCost
    points: tuple[CapacityPoint, ...]
    seconds: float

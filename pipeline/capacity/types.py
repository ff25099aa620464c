"""What a capacity study asks and answers, as data. Imports nothing heavy."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from embedding.config import StrictConfig
from embedding.limits import ELEMENT_BYTES
from embedding.planning.cluster_shape import ClusterShape
from multimodal.content_cost import CicCost, EncoderCost
from pipeline.capacity.item_load import ItemLoad
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
    activation_bytes_per_row: NonNegativeFloat = 0.0
    """The most that is alive at once from the looked-up vectors to the end of backward, float32."""
    is_averaged: bool = False
    """Whether an average of the parameters is kept beside them."""

    def rank_bytes(self, batch_size_per_rank: int) -> float:
        """On every rank: parameters with all that is kept beside them, and a batch's activations.

        Beside a value are two gradients (its own, the sum over ranks), two moments, and perhaps its
        average.
        """
        values = (5 + self.is_averaged) * self.parameters
        return values * ELEMENT_BYTES + batch_size_per_rank * self.activation_bytes_per_row

    @property
    def copy_bytes(self) -> float:
        """Of what a checkpoint is written from: values, moments, averages."""
        return (3 + self.is_averaged) * self.parameters * ELEMENT_BYTES

    def with_flops(self, flops_per_row: float) -> "DenseCost":
        """Other products a row, at the speed that this CPU was measured to have; as many values."""
        scale = flops_per_row / self.flops_per_row if self.flops_per_row else 1.0
        seconds = scale * self.cpu_seconds_per_row
        return self.model_copy(
            update={"flops_per_row": flops_per_row, "cpu_seconds_per_row": seconds}
        )


class ContentCost(StrictConfig):
    """A recipe's content: what encoder and loss cost, and the items that steps meet."""

    encoder: EncoderCost
    cic: CicCost | None
    items: ItemLoad


class Target(StrictConfig):
    """What the cluster must do; without figures every cluster that fits does."""

    rows_per_s: PositiveFloat | None = None
    rows_per_day: PositiveFloat | None = None
    """Rows of one daily retraining."""
    epochs: PositiveInt = 1
    """How often a retraining reads them."""
    window_hours: PositiveFloat = 4.0
    """Time that the retraining may take."""

    @property
    def trained_rows_per_day(self) -> float | None:
        """Rows that a daily retraining trains on, all epochs."""
        return None if self.rows_per_day is None else self.epochs * self.rows_per_day

    @property
    def needed_rows_per_s(self) -> float | None:
        """The larger of both demands."""
        rows = self.trained_rows_per_day
        daily = None if rows is None else rows / self.window_hours / 3600
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
    calibrations: tuple[Path, ...] = ()
    """Each is used for the machine it was made on; before the recipe's, if that is of it too."""
    growth_per_day: NonNegativeFloat | None = None
    """Share of today's rows that every table gains a day; None: what traffic measured."""
    kernels: tuple[str, ...] = ("fused", "fused_uvm", "fused_uvm_caching")
    dense_flops_per_row: NonNegativeFloat | None = None
    """Instead of counting the model's."""
    dense: dict[PositiveFloat, DenseCost] = {}
    """By factor of the dims; those that are missing are taken from the recipe's model."""
    content: ContentCost | None = None
    """None: taken from the recipe, where it has content."""


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
    calibration: Path | None = None
    """File that they come from; None: a data sheet."""
    shardings: dict[str, int] | None = None
    """Tables by sharding type and kernel."""
    step_s: float | None = None
    sparse_s: float | None = None
    dense_s: float | None = None
    hidden_s: float | None = None
    """Input exchange of the next batch that the dense side hides."""
    content_s: float | None = None
    """What content adds to the step; None for a recipe without content."""
    content_actor_s: float | None = None
    """Work of a step on an actor of the content service, before or beside that of the ranks."""
    content_items: float | None = None
    """Distinct items that all ranks together have encoded in a step."""
    content_bytes: int | None = None
    """Of every rank: bank, encoder and what a step holds of them."""
    rows_per_s: float | None = None
    peak_bytes: int | None = None
    """Of the fullest rank, with content and the reserved share."""
    device_bytes: int | None = None
    headroom: float | None = None
    """Free share of the fullest rank's memory, or of the fullest host's if that is less."""
    host_headroom: float | None = None
    """Free share of the fullest host's memory; None on CPU, where the ranks' memory is the host's.
    """
    host_bytes: int | None = None
    """Of the fullest host of GPUs: tables that do not live on these, and the copies that
    checkpoints are written from, of tables, bank and dense side."""
    binding: str | None = None
    offloads_at_growth: float | None = None
    """Factor of these tables' rows from which device memory alone does not hold them."""
    breaks_first: str | None = None
    """What no longer fits when the tables grow."""
    breaks_at_growth: float | None = None
    """Factor of these tables' rows at which no plan fits; None if even a thousandfold does."""
    days_left: float | None = None
    """Until then, at today's growth; None where nothing says it."""
    traffic_days: int | None = None
    """Days that the traffic is of, where they are too few to show growth and nothing else says it.
    """
    cost_per_billion_rows: float | None = None
    price_per_hour: float | None = None
    search_s: float | None = None


class CapacityAnswer(StrictConfig):
    """What `braid capacity --json` writes; version 2 (1 had no content)."""

    schema_version: Literal[1, 2] = 2
    recipe: str
    answer: str
    """The conclusion in a few sentences."""
    target: Target
    chosen: CapacityPoint | None
    dense: DenseCost
    """With the dims as they are."""
    content: ContentCost | None = None
    points: tuple[CapacityPoint, ...]
    seconds: float

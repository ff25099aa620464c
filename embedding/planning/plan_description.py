"""A sharding plan as plain data: what planning writes, training reads and checkpoints store.

Imports nothing heavy. `embedding.planning.plan` turns it into TorchRec's plan and back.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError

PHASES = ("input_dist", "prefetch", "lookup", "output_dist", "backward")
"""Parts of a step that the cost model times: ids to their owners, rows from host memory into the
device's cache, the lookup, vectors back, and their gradients with the rows' update."""

BYTE_KINDS = (
    *("weights", "optimizer", "gradient", "managed", "cache", "input", "output", "copy"),
    "process",
)
"""What a rank's memory holds of the tables. `gradient`: the dense one of data-parallel tables.
`managed`: managed collision's map of ids, and those that wait for a row.
`copy`: on CPU, of all of a rank's tables and states, while a checkpoint is written beside training.
`process`: code and buffers that the first step brings in, whatever the tables; calibrated."""

HOST_BYTE_KINDS = ("tables", "copy")
"""What a GPU's rank holds in host memory: weights and states of tables that live there, and the
copy of all of its tables and states while a checkpoint is written beside training."""


class ShardPlacement(StrictConfig):
    """One shard of a table on one rank."""

    rank: int
    row_offset: int
    column_offset: int
    num_rows: int
    num_columns: int
    weight_bytes: int
    """float32 weights, without optimizer state."""


class TablePlan(StrictConfig):
    """Where one table lives."""

    table: str
    module: str
    """Path of the collection in the model."""
    sharding: str
    kernel: str
    cache_load_factor: float | None = None
    """Share of the rows that device memory caches, for a table that lives in host memory."""
    shards: tuple[ShardPlacement, ...]
    """For `data_parallel` the whole table, once per rank."""


class RankPrediction(StrictConfig):
    """What the cost model expects of one rank."""

    bytes: dict[str, int]
    """Device memory by kind; on CPU the rank's memory."""
    host_bytes: dict[str, int]
    """Of a GPU's rank, in host memory, by kind."""
    seconds: dict[str, float]
    """By phase, one step."""


class Prediction(StrictConfig):
    """What the cost model expects of a plan."""

    constants: str
    """Where its constants come from: a data sheet, or a calibration."""
    step_s: float
    """Sparse part of one step; a phase lasts as long as its slowest rank."""
    phase_s: dict[str, float]
    ranks: tuple[RankPrediction, ...]
    binding: str
    """What limits this plan, in a sentence."""

    @property
    def imbalance(self) -> float:
        """Time of the busiest rank over the mean."""
        totals = [sum(rank.seconds.values()) for rank in self.ranks]
        mean = sum(totals) / len(totals)
        return max(totals) / mean if mean else 1.0

    @property
    def peak_bytes(self) -> int:
        """Device bytes of the fullest rank."""
        return max(sum(rank.bytes.values()) for rank in self.ranks)

    @property
    def step_peak_bytes(self) -> int:
        """The same while no checkpoint is written."""
        return max(sum(rank.bytes.values()) - rank.bytes["copy"] for rank in self.ranks)


class PlanDescription(StrictConfig):
    """A sharding plan as JSON; version 2 (1 had no prediction, topology and cache load factor)."""

    schema_version: Literal[1, 2] = 2
    world_size: int
    device_type: str
    ranks_per_host: int | None = None
    """Ranks that hierarchical sharding took as one host; None in plans of version 1."""
    topology: str | None = None
    batch_size_per_rank: int | None = None
    proposer: str | None = None
    """Which search found it."""
    tables: tuple[TablePlan, ...]
    unmeasured: tuple[str, ...] | None = None
    """Tables whose lookups no traffic has: how popular rows are is assumed. None: not known."""
    predicted: Prediction | None = Field(default=None, repr=False)

    def weight_bytes_per_rank(self) -> list[int]:
        """Bytes of table weights on every rank."""
        totals = [0] * self.world_size
        for table in self.tables:
            for shard in table.shards:
                totals[shard.rank] += shard.weight_bytes
        return totals

    def table(self, name: str) -> TablePlan | None:
        """The plan of one table."""
        return next((table for table in self.tables if table.table == name), None)


def read_plan(path: Path) -> PlanDescription:
    """A plan file.

    Raises:
        UserError: It is missing or something else.
    """
    if not path.is_file():
        raise UserError(f"plan {path} does not exist; write one with `braid plan --json {path}`")
    try:
        return PlanDescription.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"{path} is no sharding plan ({error.errors()[0]['msg']}); write one with "
            "`braid plan --json`"
        ) from error

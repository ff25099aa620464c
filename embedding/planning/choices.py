"""The ways in which one table can be sharded, and the shards each way makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from embedding.config import ColumnWise, Grid, Sharding, TableColumnWise
from embedding.errors import UserError
from embedding.limits import COLUMN_MULTIPLE
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.workload import TableLoad

DATA_PARALLEL = "data_parallel"
TABLE_WISE = "table_wise"
ROW_WISE = "row_wise"
COLUMN_WISE = "column_wise"
TABLE_ROW_WISE = "table_row_wise"
TABLE_COLUMN_WISE = "table_column_wise"
GRID = "grid_shard"
SHARDING_TYPES = (
    *(DATA_PARALLEL, TABLE_WISE, ROW_WISE, COLUMN_WISE),
    *(TABLE_ROW_WISE, TABLE_COLUMN_WISE, GRID),
)

DENSE = "dense"
FUSED = "fused"
UVM = "fused_uvm"
UVM_CACHING = "fused_uvm_caching"
KERNELS = (DENSE, FUSED, UVM, UVM_CACHING)

LOAD_FACTORS = (0.05, 0.1, 0.2, 0.4, 0.7)
DEFAULT_LOAD_FACTOR = 0.2
"""Of a cached table whose plan says none: TorchRec makes its cache so large."""
MIN_COLUMNS = 16
"""Narrowest column shard the search tries by itself: narrower rows waste memory transactions."""
MAX_COLUMN_SHARDS = 16

Domain = Literal["all", "rank", "host"]


@dataclass(frozen=True)
class Choice:
    """A sharding type with its kernel, before ranks are chosen."""

    sharding: str
    kernel: str
    column_shards: int = 1
    load_factor: float | None = None

    @property
    def domain(self) -> Domain:
        """What a unit of it is placed on."""
        if self.sharding in (DATA_PARALLEL, ROW_WISE):
            return "all"
        return "host" if self.sharding in (TABLE_ROW_WISE, GRID) else "rank"

    @property
    def num_units(self) -> int:
        """Pieces that are placed each by itself."""
        return 1 if self.domain == "all" else self.column_shards

    @property
    def one_host(self) -> bool:
        """All units must be on the ranks of one host."""
        return self.sharding == TABLE_COLUMN_WISE

    @property
    def cached_share(self) -> float:
        """Share of the rows that device memory caches."""
        if self.kernel != UVM_CACHING:
            return 0.0
        return DEFAULT_LOAD_FACTOR if self.load_factor is None else self.load_factor

    def __str__(self) -> str:
        """As a person reads it."""
        columns = f" x{self.column_shards}" if self.column_shards > 1 else ""
        cache = f" {self.load_factor:.0%}" if self.load_factor is not None else ""
        return f"{self.sharding}{columns} {self.kernel}{cache}"


def choices_of(
    load: TableLoad, shape: ClusterShape, kernels: Sequence[str] = (FUSED, UVM, UVM_CACHING)
) -> list[Choice]:
    """Every way that the kernels, the collection and the table's own `sharding` key allow.

    Raises:
        UserError: The sharding that the table forces, or managed collision needs, cannot be made on
            this cluster.
    """
    forced = load.table.sharding
    if load.managed:
        _check_managed_rows(load, shape)
        return _with_kernels([(ROW_WISE, 1)], shape, kernels)
    shardings = _forced(load, forced, shape) if forced is not None else _free(load, shape)
    return _with_kernels(shardings, shape, kernels)


def _with_kernels(
    shardings: Sequence[tuple[str, int]], shape: ClusterShape, kernels: Sequence[str]
) -> list[Choice]:
    choices = []
    for sharding, column_shards in shardings:
        if sharding == DATA_PARALLEL:
            choices.append(Choice(sharding, DENSE))
            continue
        for kernel in _kernels(shape, kernels):
            factors = LOAD_FACTORS if kernel == UVM_CACHING else (None,)
            choices += [Choice(sharding, kernel, column_shards, factor) for factor in factors]
    return choices


def _kernels(shape: ClusterShape, kernels: Sequence[str]) -> Sequence[str]:
    return kernels if shape.machine.device == "cuda" else (FUSED,)


def _free(load: TableLoad, shape: ClusterShape) -> list[tuple[str, int]]:
    shardings = [(DATA_PARALLEL, 1), (TABLE_WISE, 1)]
    if _no_empty_shard(load.num_rows, shape.world_size):
        shardings.append((ROW_WISE, 1))
    columns = [n for n in _column_counts(load.dim) if n <= min(shape.world_size, MAX_COLUMN_SHARDS)]
    shardings += [(COLUMN_WISE, n) for n in columns]
    if load.pooled and shape.num_hosts > 1 and _no_empty_shard(load.num_rows, shape.ranks_per_host):
        shardings.append((TABLE_ROW_WISE, 1))
        shardings += [(GRID, n) for n in columns if n <= shape.num_hosts]
    return shardings


def _column_counts(dim: int) -> list[int]:
    counts = [n for n in (2, 4, 8, 16) if dim % (n * COLUMN_MULTIPLE) == 0]
    return [n for n in counts if dim // n >= MIN_COLUMNS]


def _no_empty_shard(num_rows: int, num_shards: int) -> bool:
    """TorchRec's row shards are all of ceil(rows / shards), so the last ones may be empty."""
    block = -(-num_rows // num_shards)
    return block * (num_shards - 1) < num_rows


def _check_managed_rows(load: TableLoad, shape: ClusterShape) -> None:
    world, rows = shape.world_size, load.num_rows
    if _no_empty_shard(rows, world):
        return
    # TorchRec asserts that the collision module of every rank has rows; one is for unknown ids.
    enough = max(rows + -rows % world, 2 * world)
    raise UserError(
        f"table {load.name!r}: managed collision works row_wise only, which cuts its {rows} rows "
        f"into {world} blocks of {-(-rows // world)}, and the last ones are empty; use "
        f"num_embeddings={enough}, fewer ranks, or another kind of ids"
    )


def _forced(load: TableLoad, forced: Sharding, shape: ClusterShape) -> list[tuple[str, int]]:
    kind = GRID if isinstance(forced, Grid) else forced.kind
    match forced:
        case ColumnWise(num_shards=n) | TableColumnWise(num_shards=n) | Grid(num_column_shards=n):
            _check_columns(load, forced.kind, n)
        case _:
            n = 1
    if kind in (TABLE_ROW_WISE, TABLE_COLUMN_WISE, GRID) and not load.pooled:
        raise UserError(
            f"table {load.name!r}: {forced.kind} works for pooled tables only, and a sequence uses "
            "this one; use row_wise, table_wise, column_wise or data_parallel"
        )
    per_host = shape.ranks_per_host
    by_kind = {ROW_WISE: shape.world_size, TABLE_ROW_WISE: per_host, GRID: per_host}
    num_shards = by_kind.get(kind, 1)
    if not _no_empty_shard(load.num_rows, num_shards):
        # TBE kernels fail on a shard without rows, with an error about devices.
        raise UserError(
            f"table {load.name!r}: {forced.kind} cuts its {load.num_rows} rows into {num_shards} "
            f"blocks of {-(-load.num_rows // num_shards)}, and the last ones are empty; use "
            "table_wise or leave the sharding out, or change num_embeddings"
        )
    return [(kind, n)]


def _check_columns(load: TableLoad, kind: str, num_shards: int) -> None:
    if load.dim % (num_shards * COLUMN_MULTIPLE):
        raise UserError(
            f"table {load.name!r}: {kind} with {num_shards} column shards of embedding_dim="
            f"{load.dim} are not multiples of {COLUMN_MULTIPLE} columns wide; use a number of "
            f"shards that divides {load.dim // COLUMN_MULTIPLE}"
        )


def row_blocks(num_rows: int, num_shards: int) -> list[tuple[int, int]]:
    """(offset, rows) of every row shard, as TorchRec cuts them: ceil(rows / shards) each."""
    block = -(-num_rows // num_shards)
    starts = [min(block * shard, num_rows) for shard in range(num_shards + 1)]
    return [(a, b - a) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def shards_of(
    load: TableLoad, choice: Choice, targets: Sequence[int], shape: ClusterShape
) -> list[tuple[int, int, int, int, int]]:
    """(rank, row offset, column offset, rows, columns) of every shard, in TorchRec's order.

    `targets` are the ranks (or hosts, by the choice's domain) of its units; unused for `all`.
    """
    rows, dim = load.num_rows, load.dim
    width = dim // choice.column_shards
    if choice.sharding == DATA_PARALLEL:
        return [(rank, 0, 0, rows, dim) for rank in range(shape.world_size)]
    if choice.sharding == ROW_WISE:
        blocks = row_blocks(rows, shape.world_size)
        return [(rank, start, 0, n, dim) for rank, (start, n) in enumerate(blocks)]
    if choice.domain == "host":
        blocks = row_blocks(rows, shape.ranks_per_host)
        return [
            (host * shape.ranks_per_host + local, start, unit * width, n, width)
            for unit, host in enumerate(targets)
            for local, (start, n) in enumerate(blocks)
        ]
    return [(rank, 0, unit * width, rows, width) for unit, rank in enumerate(targets)]

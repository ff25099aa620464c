"""What a shard asks of its rank in one step: counted work, before any constant is applied.

A step's time is the counts times the constants of `embedding.planning.cost_constants`, so that
calibration is a linear fit. Counts that every rank has (its own samples) and counts of the shard's
owner are apart.
"""

# Names: B samples a rank, W ranks, L ranks of a host, N ids of the rank's samples.

from dataclasses import dataclass, field

import numpy as np

from embedding.config import ManagedCollision, ShardingConfig, SparseOptimizer
from embedding.limits import ELEMENT_BYTES
from embedding.planning.choices import (
    DATA_PARALLEL,
    ROW_WISE,
    UVM,
    UVM_CACHING,
    Choice,
)
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.collision_bytes import CollisionBytes, collision_bytes
from embedding.planning.counts import COUNT_INDEX, NUM_COUNTS
from embedding.planning.plan_description import BYTE_KINDS, HOST_BYTE_KINDS
from embedding.planning.workload import TableLoad

TABLES, COPY = (HOST_BYTE_KINDS.index(kind) for kind in HOST_BYTE_KINDS)

ID_BYTES = 8
LENGTH_BYTES = 4
BATCHES_IN_FLIGHT = {"cuda": 3, "cpu": 1}
"""Input buffers at once: TorchRec's sparse pipeline on CUDA works on three batches."""
SORT_BYTES = {"cuda": 70, "cpu": 0}
"""Per looked-up id while fbgemm's backward sorts ids into rows: ids and their places, twice, runs,
and room to sort in. The CPU kernel works on one table at a time."""


@dataclass(frozen=True)
class StepSettings:
    """What a plan's cost depends on besides tables and cluster."""

    batch_size_per_rank: int
    optimizer: SparseOptimizer
    wire_bytes: int = ELEMENT_BYTES
    """Bytes of an element of vectors on the wire; of gradients only on CUDA, elsewhere float32."""
    copies_for_checkpoints: bool = False
    """Whether checkpoints are written beside training, from a copy in host memory."""


def step_settings(
    batch_size_per_rank: int, optimizer: SparseOptimizer, sharding: ShardingConfig
) -> StepSettings:
    """Of a configuration."""
    return StepSettings(
        batch_size_per_rank=batch_size_per_rank,
        optimizer=optimizer,
        wire_bytes=ELEMENT_BYTES if sharding.communication == "fp32" else 2,
    )


@dataclass
class Demand:
    """Counts and bytes of one unit of a choice."""

    owner: np.ndarray = field(default_factory=lambda: np.zeros(NUM_COUNTS))
    """On the rank (each rank of the host, each rank) that the unit is placed on."""
    everyone: np.ndarray = field(default_factory=lambda: np.zeros(NUM_COUNTS))
    """On every rank, for all units together."""
    owner_bytes: np.ndarray = field(default_factory=lambda: np.zeros(len(BYTE_KINDS)))
    everyone_bytes: np.ndarray = field(default_factory=lambda: np.zeros(len(BYTE_KINDS)))
    owner_host_bytes: np.ndarray = field(default_factory=lambda: np.zeros(len(HOST_BYTE_KINDS)))


def demand_of(
    load: TableLoad, choice: Choice, shape: ClusterShape, settings: StepSettings
) -> Demand:
    """Counts of a table under a choice, for one rank's batch size."""
    context = _Context(load, choice, shape, settings)
    if choice.sharding == DATA_PARALLEL:
        return _replicated(context)
    demand = Demand()
    _count_input(context, demand)
    _count_lookup(context, demand)
    _count_output(context, demand)
    _count_update(context, demand)
    _count_bytes(context, demand)
    return demand


class _Context:
    """Sizes that several counts share."""

    def __init__(
        self, load: TableLoad, choice: Choice, shape: ClusterShape, settings: StepSettings
    ) -> None:
        self.load, self.choice, self.shape, self.settings = load, choice, shape, settings
        self.world, self.local = shape.world_size, shape.ranks_per_host
        self.batch = settings.batch_size_per_rank
        self.ids = self.batch * load.total_ids_per_sample
        """N, ids of one rank's samples."""
        self.bags = self.batch * load.num_features
        self.width = load.dim // choice.column_shards
        self.row_bytes = self.width * ELEMENT_BYTES
        self.row_shards = {"all": self.world, "host": self.local, "rank": 1}[choice.domain]
        """Ranks that share the rows of one unit."""
        vectors = self.bags if load.pooled else self.ids
        self.vectors = vectors
        half_gradients = shape.machine.device == "cuda"
        gradient_bytes = settings.wire_bytes if half_gradients else ELEMENT_BYTES
        self.wire_bytes = {
            "output": vectors * self.width * settings.wire_bytes,
            "backward": vectors * self.width * gradient_bytes,
        }
        """Of one rank's vectors of one unit, or of their gradients, on the wire."""
        self.unique = load.ids.expected_unique(self.world * self.ids) / self.row_shards
        """Distinct rows that one owner reads in a step."""
        hottest = load.ids.mass[0] / load.ids.num_rows[0]
        share = hottest + (1 - hottest) / self.row_shards
        self.owned_ids = self.world * self.ids * share
        """Ids that the owner with the hottest row gets."""

    @property
    def state_bytes_per_row(self) -> float:
        """Optimizer state of one row of a shard."""
        return state_bytes_per_row(self.settings.optimizer, self.width)

    @property
    def states_on_host(self) -> bool:
        """Optimizer state of tables in host memory stays with them and is never cached.

        Except a row-wise accumulator: FBGEMM keeps it in device memory (`construct_split_state`).
        """
        elsewhere = self.choice.kernel in (UVM, UVM_CACHING)
        return elsewhere and self.settings.optimizer.kind != "row_wise_adagrad"

    def far_share(self) -> float:
        """Share of the ranks that sit on other hosts."""
        return (self.world - self.local) / self.world


def state_bytes_per_row(optimizer: SparseOptimizer, num_columns: int) -> float:
    """Bytes of optimizer state beside one row of `num_columns`."""
    match optimizer.kind:
        case "row_wise_adagrad":
            return ELEMENT_BYTES
        case "adagrad":
            return num_columns * ELEMENT_BYTES
        case "adam":
            return 2 * num_columns * ELEMENT_BYTES
        case "sgd":
            return 0.0


def _put(counts: np.ndarray, **values: float) -> None:
    for name, value in values.items():
        counts[COUNT_INDEX[name]] += value


def _count_input(c: _Context, demand: Demand) -> None:
    units = c.choice.num_units
    bucketized = c.row_shards > 1
    lengths_sent = c.bags * units * (c.row_shards if bucketized else 1)
    _put(
        demand.everyone,
        input_sent_ids=c.ids * units,
        input_lengths=lengths_sent,
        input_bucketized_ids=c.ids * units if bucketized else 0,
        input_managed_ids=c.ids if c.load.managed else 0,
        input_inter_bytes=0.5 * c.ids * units * ID_BYTES * c.far_share(),
    )
    _put(
        demand.owner,
        input_received_ids=c.owned_ids,
        input_lengths=c.world * c.bags,
        input_managed_ids=c.owned_ids if c.load.managed else 0,
        input_inter_bytes=0.5 * c.owned_ids * ID_BYTES * c.far_share(),
    )


def _count_lookup(c: _Context, demand: Demand) -> None:
    bags = c.world * c.bags if c.load.pooled else c.owned_ids
    _put(
        demand.owner,
        lookup_bags=bags,
        lookup_ids=c.owned_ids,
        lookup_bytes=c.owned_ids * c.row_bytes,
        lookup_unique_bytes=c.unique * c.row_bytes,
    )
    match c.choice.kernel:
        case "fused_uvm":
            # The forward of a table in EmbeddingLocation.MANAGED reads the row of every id where it
            # lies (FBGEMM, embedding_forward_split_template.cu), and GPUs do not cache host memory
            # (CUDA C++ Best Practices Guide, zero copy): a row that occurs twice crosses twice.
            _put(demand.owner, lookup_host_bytes=c.owned_ids * c.row_bytes)
        case "fused_uvm_caching":
            # Every row that comes in pushes one out.
            moved = 2 * _missed_rows(c) * c.row_bytes
            _put(demand.owner, prefetch_ids=c.owned_ids, prefetch_bytes=moved)


def _missed_rows(c: _Context) -> float:
    """Distinct rows of a step that are not cached."""
    cached = c.choice.cached_share * c.load.num_rows
    return c.load.ids.missed_rows(cached, c.world * c.ids) / c.row_shards


def _count_output(c: _Context, demand: Demand) -> None:
    _put(demand.everyone, output_bytes=c.vectors * c.load.dim * ELEMENT_BYTES)
    for phase, reduce, exchange, inter in (
        ("output", "reduce_bytes", "exchange_bytes", "output_inter_bytes"),
        ("backward", "backward_gather_bytes", "backward_exchange_bytes", "backward_inter_bytes"),
    ):
        wire_bytes = c.wire_bytes[phase]
        if not c.load.pooled and c.row_shards > 1:
            # Every id's vector goes back from its row's owner.
            sent = wire_bytes * (c.world - 1) / c.world
            _put(demand.owner, **{exchange: sent, inter: wire_bytes * c.far_share()})
        elif c.choice.sharding == ROW_WISE:
            # Partial sums of all samples; the ring crosses hosts on all of their cards at once.
            sent = (c.world - 1) * wire_bytes
            far = sent / c.local if c.far_share() else 0.0
            _put(demand.owner, **{reduce: sent, inter: far})
        elif c.choice.domain == "host":
            summed = (c.local - 1) / c.local * c.world * wire_bytes
            hosts = c.world // c.local
            _put(demand.owner, **{reduce: summed, inter: 0.5 * (hosts - 1) * wire_bytes})
            far = 0.5 * c.choice.num_units * wire_bytes * c.far_share()
            _put(demand.everyone, **{inter: far})
        else:
            _put_exchange(c, demand, wire_bytes, exchange, inter)


def _put_exchange(
    c: _Context, demand: Demand, wire_bytes: float, exchange: str, inter: str
) -> None:
    """All-to-all: the owner sends all vectors, everyone receives its own; half the time each.

    What the owner sends to itself crosses no link, which is taken off its own side.
    """
    others = c.world - 1
    _put(
        demand.owner,
        **{
            exchange: 0.5 * (others - 1) * wire_bytes,
            inter: 0.5 * (c.world - c.local) * wire_bytes,
        },
    )
    received = c.choice.num_units * wire_bytes
    _put(
        demand.everyone,
        **{
            exchange: 0.5 * received,
            inter: 0.5 * c.far_share() * received,
        },
    )


def _count_update(c: _Context, demand: Demand) -> None:
    touched = c.unique * (c.row_bytes + c.state_bytes_per_row)
    # Read and written where they are: rows without a cache, states also beside cached rows. Ids are
    # sorted into rows before, so each distinct row once.
    host = c.row_bytes if c.choice.kernel == UVM else 0.0
    if c.states_on_host:
        host += c.state_bytes_per_row
    _put(
        demand.owner,
        update_ids=c.owned_ids,
        update_bytes=c.owned_ids * c.row_bytes,
        update_unique_rows=c.unique,
        update_unique_bytes=touched,
        update_host_bytes=2 * c.unique * host,
    )


def _count_bytes(c: _Context, demand: Demand) -> None:
    rows = -(-c.load.num_rows // c.row_shards)
    weights, states = rows * c.row_bytes, rows * c.state_bytes_per_row
    device, cache = 1.0, 0.0
    if c.choice.kernel in (UVM, UVM_CACHING):
        device = 0.0
        if c.choice.kernel != UVM:
            # Cached rows, and their places: 4 bytes a row, 16 bytes a slot.
            factor = c.choice.cached_share
            cache = factor * weights + rows * (4 + 16 * factor)
    states_here = 0.0 if c.states_on_host else states
    demand.owner_host_bytes[TABLES] = weights * (1 - device) + states - states_here
    managed = _collision_bytes(c, rows)
    _count_copy(c, demand, weights + states + managed.saved)
    flight = BATCHES_IN_FLIGHT[c.shape.machine.device]
    received = c.owned_ids * ID_BYTES + c.world * c.bags * LENGTH_BYTES
    vectors = c.world * c.vectors * c.row_bytes
    if not c.load.pooled:
        vectors /= c.row_shards
    demand.owner_bytes += _bytes(
        weights=weights * device,
        optimizer=states_here,
        managed=managed.held + managed.eviction,
        cache=cache,
        input=received * flight,
        output=_step_vectors(c, vectors, c.owned_ids),
    )
    if c.world == 1:
        return  # nothing is exchanged
    own = c.ids * ID_BYTES + c.bags * LENGTH_BYTES
    units = c.choice.num_units
    demand.everyone_bytes += _bytes(
        input=own * units * flight, output=2 * c.vectors * c.load.dim * ELEMENT_BYTES
    )


def _collision_bytes(c: _Context, rows: int) -> CollisionBytes:
    scheme = c.load.table.ids
    if not isinstance(scheme, ManagedCollision):
        return CollisionBytes(held=0.0, eviction=0.0, saved=0.0)
    seen = c.world * c.ids * scheme.eviction_interval_steps
    distinct = c.load.ids.expected_unique(seen) / c.row_shards
    return collision_bytes(scheme, rows, c.owned_ids, distinct)


def _count_copy(c: _Context, demand: Demand, num_bytes: float) -> None:
    """The copy of a shard that a checkpoint is written from."""
    if not c.settings.copies_for_checkpoints:
        return
    if c.shape.machine.device == "cpu":
        demand.owner_bytes += _bytes(copy=num_bytes)
    else:
        demand.owner_host_bytes[COPY] = num_bytes


def _step_vectors(c: _Context, vectors: float, num_ids: float) -> float:
    """Looked-up vectors and their gradients; the former are gone when backward sorts ids."""
    return vectors + max(vectors, SORT_BYTES[c.shape.machine.device] * num_ids)


def _bytes(**values: float) -> np.ndarray:
    return np.array([values.get(kind, 0.0) for kind in BYTE_KINDS])


def _replicated(c: _Context) -> Demand:
    """A data-parallel table: local lookups, a dense gradient that is all-reduced."""
    demand = Demand()
    table_bytes = c.load.num_rows * c.load.dim * ELEMENT_BYTES
    looked_up = c.ids * c.load.dim * ELEMENT_BYTES
    unique = c.load.ids.expected_unique(c.world * c.ids)
    ring = 2 * (c.world - 1) / c.world * table_bytes
    states = c.load.num_rows * state_bytes_per_row(c.settings.optimizer, c.load.dim)
    _put(
        demand.owner,
        lookup_bags=c.bags if c.load.pooled else c.ids,
        lookup_ids=c.ids,
        replicated_lookup_bytes=looked_up,
        output_bytes=c.vectors * c.load.dim * ELEMENT_BYTES,
        replicated_table_bytes=table_bytes,
        replicated_update_bytes=looked_up + unique * c.load.dim * ELEMENT_BYTES,
        all_reduce_bytes=ring,
        all_reduce_inter_bytes=ring / c.local if c.far_share() else 0.0,
    )
    demand.owner_bytes += _bytes(
        weights=table_bytes,
        optimizer=states,
        gradient=2 * table_bytes,
        input=(c.ids * ID_BYTES + c.bags * LENGTH_BYTES)
        * BATCHES_IN_FLIGHT[c.shape.machine.device],
        output=_step_vectors(c, c.vectors * c.load.dim * ELEMENT_BYTES, c.ids),
    )
    # One rank writes it; its host's memory is counted in shares of ranks.
    _count_copy(c, demand, (table_bytes + states) / c.local)
    return demand

"""The cost model: what a placement of all tables costs in time and memory, on every rank.

A phase lasts as long as its slowest rank, and the phases of a step follow each other:

    step = sum over phases of max over ranks of (counts x constants) + calls of every sharding group

TorchRec runs one exchange and one kernel per sharding type of a collection, so each type in use has
its price; that price is a group's.
"""

# Shapes: P phases, W ranks, K counts, M kinds of bytes, H of those in host memory.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from embedding.limits import ELEMENT_BYTES
from embedding.planning.choices import DATA_PARALLEL, ROW_WISE, UVM_CACHING, Choice
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost_constants import CostConstants
from embedding.planning.counts import COUNT_INDEX, NUM_COUNTS, PHASE_OF_COUNT
from embedding.planning.demand import (
    Demand,
    StepSettings,
    demand_of,
)
from embedding.planning.plan_description import BYTE_KINDS, HOST_BYTE_KINDS, PHASES
from embedding.planning.workload import TableLoad

RESERVED_SHARE = 0.15
"""Share of every rank's memory that is kept free for the dense side and the allocator's slack."""
SLACK_SHARE = 0.05
"""Of it, for the slack alone: a dense side that is known to need more than the rest gets it."""

_PHASE_OF = np.equal.outer(np.arange(len(PHASES)), PHASE_OF_COUNT).astype(float)

GroupKey = tuple[str, str, bool]
"""Collection, sharding type, whether its rows are cached: what shares one kernel."""


class Placed(NamedTuple):
    """A choice and the ranks (or hosts) of its units."""

    choice: Choice
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Priced:
    """A choice of one table in seconds and bytes."""

    choice: Choice
    demand: Demand
    owner_s: np.ndarray
    """(P,) on the owner of one unit."""
    everyone_s: np.ndarray
    """(P,) on every rank."""
    owner_bytes: float
    everyone_bytes: float
    owner_host_bytes: float
    """In the memory of the host of one owner; per owner, all kinds."""
    mean_s: float
    """Mean over the ranks, all phases: the cost under a perfect balance."""


class CostModel:
    """Prices of choices on one cluster, for one batch size and one set of constants."""

    def __init__(
        self,
        loads: Sequence[TableLoad],
        shape: ClusterShape,
        settings: StepSettings,
        constants: CostConstants,
        reserved_bytes: float | None = None,
        reserved_host_bytes: float = 0.0,
    ) -> None:
        """`reserved_bytes` of every rank hold no table; by default a share of its memory.

        `reserved_host_bytes` of every host of GPUs hold none either, beside that share of it.
        """
        self.loads = {load.name: load for load in loads}
        self.shape, self.settings, self.constants = shape, settings, constants
        self._c_K = constants.vector()
        self._priced: dict[tuple[str, Choice], Priced] = {}
        self._group_s: dict[GroupKey, np.ndarray] = {}
        self._group_price: dict[GroupKey, float] = {}
        reserved = RESERVED_SHARE * shape.device_bytes if reserved_bytes is None else reserved_bytes
        self.device_capacity = shape.device_bytes - reserved
        whole_host = shape.host_bytes_per_rank * shape.ranks_per_host
        self.host_capacity = whole_host * (1 - RESERVED_SHARE) - reserved_host_bytes
        """Of one host, for tables that do not live on its devices."""
        batch = settings.batch_size_per_rank
        self.assembly_bytes = float(
            sum(batch * vectors_per_sample(load) * load.dim * ELEMENT_BYTES for load in loads)
        )
        """Of the looked-up fields of one rank's batch."""
        self.fixed_s = constants.step_s + constants.assembly_byte_s * self.assembly_bytes
        """Seconds of a step that no plan changes: its start, and putting the fields together."""

    def price(self, table: str, choice: Choice) -> Priced:
        """The choice's price; computed once."""
        key = (table, choice)
        if key not in self._priced:
            demand = demand_of(self.loads[table], choice, self.shape, self.settings)
            owner_s = _PHASE_OF @ (demand.owner * self._c_K)
            everyone_s = _PHASE_OF @ (demand.everyone * self._c_K)
            owned_share = self.num_owners(choice) / self.shape.world_size
            self._priced[key] = Priced(
                choice=choice,
                demand=demand,
                owner_s=owner_s,
                everyone_s=everyone_s,
                mean_s=float((everyone_s + owner_s * owned_share).sum()),
                owner_bytes=float(demand.owner_bytes.sum()),
                everyone_bytes=float(demand.everyone_bytes.sum()),
                owner_host_bytes=float(demand.owner_host_bytes.sum()),
            )
        return self._priced[key]

    def group_of(self, table: str, choice: Choice) -> GroupKey:
        """The kernel and exchange that the table would share."""
        cached = choice.kernel == UVM_CACHING
        return self.loads[table].module, choice.sharding, cached

    def group_seconds(self, key: GroupKey) -> np.ndarray:
        """(P,) what a group costs every rank by being there."""
        if key not in self._group_s:
            self._group_s[key] = _PHASE_OF @ (group_counts(key) * self._c_K)
        return self._group_s[key]

    def num_owners(self, choice: Choice) -> int:
        """Ranks with a unit, counted once for every unit."""
        per_unit = {"all": self.shape.world_size, "host": self.shape.ranks_per_host, "rank": 1}
        return choice.num_units * per_unit[choice.domain]

    def owners(self, choice: Choice, target: int) -> slice:
        """Ranks that a unit on `target` is placed on."""
        match choice.domain:
            case "all":
                return slice(0, self.shape.world_size)
            case "host":
                start = target * self.shape.ranks_per_host
                return slice(start, start + self.shape.ranks_per_host)
            case "rank":
                return slice(target, target + 1)

    def step_seconds(self, seconds_PW: np.ndarray, groups_s: float) -> float:
        """Time of the sparse part of a step; `groups_s` is the price of all groups in use."""
        return self.fixed_s + groups_s + float(self.phase_seconds(seconds_PW).sum())

    def group_price(self, key: GroupKey) -> float:
        """Seconds of a group, all phases."""
        if key not in self._group_price:
            self._group_price[key] = float(self.group_seconds(key).sum())
        return self._group_price[key]

    def phase_seconds(self, seconds_PW: np.ndarray) -> np.ndarray:
        """(P,) a phase lasts as long as its slowest rank, or as its host's cores need."""
        slowest_P = seconds_PW.max(axis=1)
        cores = self.constants.cores_per_host
        if cores is None or self.shape.ranks_per_host <= cores:
            return slowest_P
        hosts_PHL = seconds_PW.reshape(len(PHASES), self.shape.num_hosts, -1)
        return np.maximum(slowest_P, hosts_PHL.sum(axis=2).max(axis=1) / cores)


def vectors_per_sample(load: TableLoad) -> float:
    """Looked-up vectors of one sample after pooling."""
    return load.num_features if load.pooled else load.total_ids_per_sample


def group_counts(key: GroupKey) -> np.ndarray:
    """(K,) calls of one group on every rank."""
    collection, sharding, cached = key
    pooled = not collection.removeprefix("managed_").startswith("unpooled")
    counts_K = np.zeros(NUM_COUNTS)
    names = ["lookup_calls"]
    if sharding == DATA_PARALLEL:
        names.append("replicated_calls")
    else:
        names += ["input_calls", "backward_calls"]
        summed = pooled and (sharding == ROW_WISE or "row_wise" in sharding or "grid" in sharding)
        names.append("reduce_calls" if summed else "exchange_calls")
    if cached:
        names.append("prefetch_calls")
    for name in names:
        counts_K[COUNT_INDEX[name]] += 1
    return counts_K


@dataclass
class Usage:
    """Seconds, bytes and groups of a whole placement."""

    seconds_PW: np.ndarray
    device_bytes_W: np.ndarray
    host_bytes_WH: np.ndarray
    """In host memory, by the rank whose tables they are of."""
    counts_WK: np.ndarray
    bytes_WM: np.ndarray
    groups: list[GroupKey]


def usage_of(model: CostModel, placement: dict[str, Placed]) -> Usage:
    """Add up a placement, from nothing."""
    shape = model.shape
    world = shape.world_size
    counts_WK, bytes_WM = np.zeros((world, NUM_COUNTS)), np.zeros((world, len(BYTE_KINDS)))
    bytes_WM[:, BYTE_KINDS.index("process")] = model.constants.process_bytes
    host_bytes_WH = np.zeros((world, len(HOST_BYTE_KINDS)))
    groups: dict[GroupKey, None] = {}
    for table, (choice, targets) in placement.items():
        priced = model.price(table, choice)
        groups[model.group_of(table, choice)] = None
        counts_WK += priced.demand.everyone
        bytes_WM += priced.demand.everyone_bytes
        for target in targets:
            owners = model.owners(choice, target)
            counts_WK[owners] += priced.demand.owner
            bytes_WM[owners] += priced.demand.owner_bytes
            host_bytes_WH[owners] += priced.demand.owner_host_bytes
    return Usage(
        seconds_PW=_PHASE_OF @ (counts_WK * model._c_K).T,
        device_bytes_W=bytes_WM.sum(axis=1),
        host_bytes_WH=host_bytes_WH,
        counts_WK=counts_WK,
        bytes_WM=bytes_WM,
        groups=list(groups),
    )

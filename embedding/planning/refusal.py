"""Why no plan fits: which tables, how many bytes short, and the smallest change that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from embedding.config import RowWiseAdagrad, TableConfig
from embedding.errors import UserError
from embedding.limits import COLUMN_MULTIPLE
from embedding.planning.choices import UVM, UVM_CACHING, Choice, choices_of
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import CostModel, usage_of
from embedding.planning.demand import COPY, TABLES
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest
from embedding.planning.prediction import placement_of
from embedding.planning.proposers import Options, total_bytes
from embedding.planning.search import fits_somehow

GIB = 1 << 30
_MAX_HOSTS = 512
_NAMED = 3


def refusal(request: PlanRequest) -> UserError:
    """The error for a request that `plan_tables` found no plan for."""
    model = request.model()
    if request.pinned is not None:
        return _pinned_too_large(request, request.pinned, model)
    remedies = list(_remedies(request))
    hint = (
        "; or ".join(remedies)
        if remedies
        else "use fewer or smaller tables: no single change of hosts, kernels, dims, optimizer or "
        "batch size fits them"
    )
    return UserError(
        f"no sharding plan fits {request.shape.name}: {shortage(request, model)}; {hint}"
    )


def _pinned_too_large(request: PlanRequest, pinned: PlanDescription, model: CostModel) -> UserError:
    placement = placement_of(pinned, list(model.loads.values()), request.shape)
    usage = usage_of(model, placement)
    rank = int(usage.device_bytes_W.argmax())
    needed = float(usage.device_bytes_W[rank])
    short = needed - model.device_capacity
    where = f"rank {rank} needs {_gib(needed)} of {_gib(model.device_capacity)}"
    why = f"{where}, {_gib(short)} short" if short > 0 else "the other tables fit nowhere beside it"
    per_host = usage.host_bytes_WH.sum(axis=1).reshape(request.shape.num_hosts, -1).sum(axis=1)
    most = float(per_host.max())
    if most > model.host_capacity:
        why = (
            f"a host needs {_gib(most)} of {_gib(model.host_capacity)} for tables that live there "
            f"and the copy that checkpoints are written from, {_gib(most - model.host_capacity)} "
            "short"
        )
    return UserError(
        f"the pinned plan does not fit {request.shape.name}: {why}; plan again without it"
    )


def shortage(request: PlanRequest, model: CostModel) -> str:
    """What there is too little of, with tables and bytes."""
    options = {
        load.name: choices_of(load, request.shape, request.kernels) for load in model.loads.values()
    }
    return _large_piece(model, options) or _too_little(request.shape, model, options)


def _large_piece(model: CostModel, options: Options) -> str | None:
    """A table whose smallest shard alone fits on no rank."""
    capacity = model.device_capacity
    pieces = {
        table: min(
            model.price(table, c).owner_bytes + model.price(table, c).everyone_bytes
            for c in choices
        )
        for table, choices in options.items()
    }
    too_large = [table for table, piece in pieces.items() if piece > capacity]
    if not too_large:
        return None
    worst = max(too_large, key=lambda table: pieces[table])
    return (
        f"{_names(too_large)}: the smallest piece of table {worst!r} needs {_gib(pieces[worst])} "
        f"on one rank, which has {_gib(capacity)} for tables, "
        f"{_gib(pieces[worst] - capacity)} short"
    )


def _too_little(shape: ClusterShape, model: CostModel, options: Options) -> str:
    """All tables against all memory; where that suffices, they only fit unevenly."""
    needed = {
        table: min(_all_bytes(model, table, choice) for choice in choices)
        for table, choices in options.items()
    }
    copies = sum(
        min(_host_bytes(model, table, choice, COPY) for choice in choices)
        for table, choices in options.items()
    )
    host_room = model.host_capacity * shape.num_hosts
    if copies > host_room:
        return (
            f"checkpoints are written beside training from a copy of the tables, which needs "
            f"{_gib(copies)} of {_gib(host_room)} that the memory of "
            f"{_counted(shape.num_hosts, 'host')} has for it, {_gib(copies - host_room)} short"
        )
    uses_host = any(
        _host_bytes(model, table, choice, TABLES)
        for table, choices in options.items()
        for choice in choices
    )
    room = model.device_capacity * shape.world_size
    where = _counted(shape.world_size, "rank")
    if uses_host:
        room += host_room - copies
        where += f" and the memory of {_counted(shape.num_hosts, 'host')}"
    largest = _names(sorted(needed, key=lambda table: -needed[table]))
    total = sum(needed.values())
    if total > room:
        return (
            f"the tables and their buffers need {_gib(total)} of {_gib(room)} that {where} have "
            f"for them, {_gib(total - room)} short; largest are {largest}"
        )
    return (
        f"the tables and their buffers need {_gib(total)} of {_gib(room)} that {where} have for "
        f"them, and their pieces do not fill that evenly; largest are {largest}"
    )


def _all_bytes(model: CostModel, table: str, choice: Choice) -> float:
    return total_bytes(model, table, choice) + _host_bytes(model, table, choice, TABLES)


def _host_bytes(model: CostModel, table: str, choice: Choice, kind: int) -> float:
    owned = model.price(table, choice).demand.owner_host_bytes[kind]
    return float(owned) * model.num_owners(choice)


def _remedies(request: PlanRequest) -> Iterator[str]:
    """Single changes that make it fit, the cheapest first."""
    if request.shape.machine.device == "cuda" and not {UVM, UVM_CACHING} & set(request.kernels):
        kernels = (*request.kernels, UVM_CACHING)
        if fits(replace(request, kernels=kernels)):
            yield "allow fused_uvm_caching, which keeps cold rows in host memory"
    if request.settings.optimizer.kind not in ("row_wise_adagrad", "sgd"):
        settings = replace(request.settings, optimizer=RowWiseAdagrad())
        if fits(replace(request, settings=settings)):
            kind = request.settings.optimizer.kind
            yield (
                f"use embedding.optimizer row_wise_adagrad instead of {kind}: 4 bytes of state a "
                "row instead of one or two values an element"
            )
    batch = _smaller_batch(request)
    if batch is not None:
        yield f"use ranking.trainer.batch_size_per_rank={batch}"
    forced = [table.name for table in request.schema.tables if table.sharding is not None]
    if forced and fits(_unforced(request)):
        yield f"remove the forced sharding of {_names(forced)}"
    larger = _large_enough(request)
    if larger is not None:
        yield f"use {larger.name}"
    dims = _smaller_dims(request)
    if dims is not None:
        yield f"use a smaller embedding_dim: {dims}"


def fits(request: PlanRequest) -> bool:
    """Whether some plan of the request fits; no plan is searched for."""
    try:
        model = request.model()
        options = {
            load.name: choices_of(load, request.shape, request.kernels)
            for load in model.loads.values()
        }
        return fits_somehow(model, options)
    except UserError:
        return False


def _unforced(request: PlanRequest) -> PlanRequest:
    tables = tuple(t.model_copy(update={"sharding": None}) for t in request.schema.tables)
    schema = request.schema.model_copy(update={"tables": tables})
    return replace(request, schema=schema)


def _smaller_batch(request: PlanRequest) -> int | None:
    batch = request.settings.batch_size_per_rank
    smallest_batch = replace(request, settings=replace(request.settings, batch_size_per_rank=1))
    if not fits(smallest_batch):
        return None
    while batch > 1:
        batch //= 2
        if fits(replace(request, settings=replace(request.settings, batch_size_per_rank=batch))):
            return batch
    return None


def _large_enough(request: PlanRequest) -> ClusterShape | None:
    """The smallest larger cluster of such hosts that fits: full hosts first, then more of them."""
    shape = request.shape
    full = shape.machine.ranks_per_host
    if shape.num_hosts == 1 and shape.machine.device == "cuda":
        ranks = shape.ranks_per_host
        while ranks < full:
            ranks = min(2 * ranks, full)
            shape = shape.model_copy(update={"ranks_per_host": ranks})
            if fits(replace(request, shape=shape)):
                return shape
    low = high = shape.num_hosts
    while not fits(replace(request, shape=shape.with_hosts(high))):
        low, high = high, 2 * high
        if high > _MAX_HOSTS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(request, shape=shape.with_hosts(middle))):
            high = middle
        else:
            low = middle
    return shape.with_hosts(high)


def _smaller_dims(request: PlanRequest) -> str | None:
    """Halve the dims of the largest tables, one after another, until it fits."""
    tables = {table.name: table for table in request.schema.tables}
    halved: dict[str, int] = {}
    for _ in range(4 * len(tables)):
        able = [t for t in tables.values() if t.embedding_dim >= 2 * COLUMN_MULTIPLE]
        if not able:
            return None
        largest = max(able, key=lambda t: t.num_embeddings * t.embedding_dim)
        dim = largest.embedding_dim // 2 // COLUMN_MULTIPLE * COLUMN_MULTIPLE
        tables[largest.name] = largest.model_copy(update={"embedding_dim": dim})
        halved[largest.name] = dim
        if fits(_with_tables(request, tuple(tables.values()))):
            named = [f"{name} {dim}" for name, dim in list(halved.items())[:_NAMED]]
            more = f" and {len(halved) - _NAMED} more" if len(halved) > _NAMED else ""
            return ", ".join(named) + more
    return None


def _with_tables(request: PlanRequest, tables: tuple[TableConfig, ...]) -> PlanRequest:
    return replace(request, schema=request.schema.model_copy(update={"tables": tables}))


def _names(tables: list[str]) -> str:
    shown = ", ".join(repr(table) for table in tables[:_NAMED])
    rest = len(tables) - _NAMED
    return shown + (f" and {rest} more" if rest > 0 else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _gib(num_bytes: float) -> str:
    return (
        f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:,.2f} MiB"
    )

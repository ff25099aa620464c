"""Why no plan fits: which tables, how many bytes short, and the smallest change that would fit."""

from collections.abc import Iterator
from dataclasses import replace

from embedding.choices import UVM, UVM_CACHING, choices_of
from embedding.config import RowWiseAdagrad, TableConfig
from embedding.cost import CostModel, usage_of
from embedding.errors import UserError
from embedding.limits import COLUMN_MULTIPLE
from embedding.plan_description import PlanDescription
from embedding.planning import PlanRequest
from embedding.prediction import placement_of
from embedding.proposers import smallest, total_bytes
from embedding.search import fits_somehow

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
    return UserError(
        f"the pinned plan does not fit {request.shape.name}: {why}; plan again without it"
    )


def shortage(request: PlanRequest, model: CostModel) -> str:
    """What there is too little of, with tables and bytes."""
    options = {
        load.name: choices_of(load, request.shape, request.kernels) for load in model.loads.values()
    }
    choices = smallest(options, model)
    capacity = model.device_capacity
    pieces = {
        table: min(
            model.price(table, c).owner_bytes + model.price(table, c).everyone_bytes
            for c in options[table]
        )
        for table in options
    }
    too_large = [table for table, piece in pieces.items() if piece > capacity]
    if too_large:
        worst = max(too_large, key=lambda table: pieces[table])
        return (
            f"{_names(too_large)}: the smallest piece of table {worst!r} needs "
            f"{_gib(pieces[worst])} on one rank, which has {_gib(capacity)} for tables, "
            f"{_gib(pieces[worst] - capacity)} short"
        )
    needed = {table: total_bytes(model, table, choice) for table, choice in choices.items()}
    world = request.shape.world_size
    short = sum(needed.values()) - capacity * world
    largest = sorted(needed, key=lambda table: -needed[table])
    if short > 0:
        return (
            f"the tables need {_gib(sum(needed.values()))} on {world} ranks that have "
            f"{_gib(capacity * world)} for them, {_gib(short)} short; largest are {_names(largest)}"
        )
    host = _hostshortage(request, model)
    if host is not None:
        return host
    return (
        f"the tables need {_gib(sum(needed.values()))} of {_gib(capacity * world)}, but their "
        f"pieces do not fill the ranks evenly; largest are {_names(largest)}"
    )


def _hostshortage(request: PlanRequest, model: CostModel) -> str | None:
    offloaded = [
        (load.name, min(
            (model.price(load.name, c).owner_host_bytes * model.num_owners(c)
             for c in choices_of(load, request.shape, request.kernels)
             if c.kernel in (UVM, UVM_CACHING)),
            default=0.0,
        ))
        for load in model.loads.values()
    ]  # fmt: skip
    needed = sum(size for _, size in offloaded)
    room = model.host_capacity * request.shape.num_hosts
    room += model.device_capacity * request.shape.world_size
    if needed <= room:
        return None
    largest = sorted(offloaded, key=lambda entry: -entry[1])
    return (
        f"even with tables in host memory, {_gib(needed)} do not fit {_gib(room)} of device and "
        f"host memory, {_gib(needed - room)} short; largest are "
        f"{_names([name for name, _ in largest])}"
    )


def _remedies(request: PlanRequest) -> Iterator[str]:
    """Single changes that make it fit, the cheapest first."""
    if request.shape.machine.device == "cuda" and not {UVM, UVM_CACHING} & set(request.kernels):
        kernels = (*request.kernels, UVM_CACHING)
        if _fits(replace(request, kernels=kernels)):
            yield "allow fused_uvm_caching, which keeps cold rows in host memory"
    if request.settings.optimizer.kind not in ("row_wise_adagrad", "sgd"):
        settings = replace(request.settings, optimizer=RowWiseAdagrad())
        if _fits(replace(request, settings=settings)):
            kind = request.settings.optimizer.kind
            yield (
                f"use embedding.optimizer row_wise_adagrad instead of {kind}: 4 bytes of state a "
                "row instead of one or two values an element"
            )
    batch = _smaller_batch(request)
    if batch is not None:
        yield f"use ranking.trainer.batch_size_per_rank={batch}"
    forced = [table.name for table in request.schema.tables if table.sharding is not None]
    if forced and _fits(_unforced(request)):
        yield f"remove the forced sharding of {_names(forced)}"
    hosts = _enough_hosts(request)
    if hosts is not None:
        yield f"use {request.shape.with_hosts(hosts).name}"
    dims = _smaller_dims(request)
    if dims is not None:
        yield f"use a smaller embedding_dim: {dims}"


def _fits(request: PlanRequest) -> bool:
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
    if not _fits(smallest_batch):
        return None
    while batch > 1:
        batch //= 2
        if _fits(replace(request, settings=replace(request.settings, batch_size_per_rank=batch))):
            return batch
    return None


def _enough_hosts(request: PlanRequest) -> int | None:
    """The smallest number of such hosts that fits; None if even very many do not."""
    low = high = request.shape.num_hosts
    while not _fits(replace(request, shape=request.shape.with_hosts(high))):
        low, high = high, 2 * high
        if high > _MAX_HOSTS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(replace(request, shape=request.shape.with_hosts(middle))):
            high = middle
        else:
            low = middle
    return high


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
        if _fits(_with_tables(request, tuple(tables.values()))):
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


def _gib(num_bytes: float) -> str:
    return (
        f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:,.2f} MiB"
    )

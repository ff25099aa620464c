"""State of managed-collision modules, independent of ranks: saved by row, re-inserted by id.

Every shard owns the ids of one range (see `managed_collision`) and has its own unknown row, the
last one. When the number of ranks or rows changes, every id moves to its new owner, and its
embedding row and optimizer state move with it.
"""

# Shapes: N rows of a shard, K kept ids, P ids seen since the last eviction.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.mc_modules import MCHManagedCollisionModule

from embedding.checkpoint_files import ManagedClock
from embedding.hashing import MANAGED_ID_RANGE, NO_ID


@dataclass(frozen=True)
class PendingIds:
    """Ids seen since the last eviction, in order, and what the policy remembers of each."""

    ids_P: Tensor
    metadata: dict[str, Tensor]


def managed_modules(model: nn.Module) -> dict[str, MCHManagedCollisionModule]:
    """This rank's collision module of every managed-collision table."""
    return {
        name.split(".")[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, MCHManagedCollisionModule)
    }


def owner_of(ids: Tensor, world_size: int) -> Tensor:
    """Rank that owns each id: TorchRec's row-wise bucketing of [0, 2**62)."""
    return ids // -(-MANAGED_ID_RANGE // world_size)


def owned_by(ids: Tensor, rank: int, world_size: int) -> Tensor:
    """Places of the ids that `rank` owns, ascending; rows without an id have none."""
    return ((ids != NO_ID) & (owner_of(ids, world_size) == rank)).nonzero().squeeze(1)


def rows_of_module(module: MCHManagedCollisionModule) -> tuple[int, int]:
    """First global row of the module, and the row after the last one."""
    start = module._output_global_offset
    return start, start + module._zch_size


def clock_of(module: MCHManagedCollisionModule) -> ManagedClock:
    """The module's counters."""
    return ManagedClock(
        iteration=module._current_iter,
        last_eviction=module._last_eviction_iter,
        num_pending=module._current_history_buffer_offset,
    )


def by_row(module: MCHManagedCollisionModule) -> dict[str, Tensor]:
    """`ids` and the policy's metadata, (N,) each, by local row instead of sorted by id."""
    rows_N = module._mch_remapped_ids_mapping - module._output_global_offset
    sorted_state = {"ids": module._mch_sorted_raw_ids, **module._mch_metadata}
    return {
        name: torch.empty_like(values).index_copy_(0, rows_N, values)
        for name, values in sorted_state.items()
    }


def set_by_row(module: MCHManagedCollisionModule, state: dict[str, Tensor], now: int) -> None:
    """The inverse of `by_row`.

    Args:
        module: holds no id yet; its eviction policy may be another one than that of the module that
            was saved.
        state: `ids` and metadata, (N,) each.
        now: the iteration that the module is at.
    """
    start, stop = rows_of_module(module)
    empty = {name: values.to(state["ids"].device) for name, values in by_row(module).items()}
    mapping = module._mch_remapped_ids_mapping
    mapping.copy_(torch.arange(start, stop, device=mapping.device))
    module._mch_sorted_raw_ids.copy_(state["ids"])
    for name, values in module._mch_metadata.items():
        unknown = torch.where(
            state["ids"] == NO_ID, empty[name], _as_if_seen_once(name, state["ids"], now)
        )
        values.copy_(state.get(name, unknown))
    module._sort_mch_buffers()


def _as_if_seen_once(name: str, ids: Tensor, now: int) -> Tensor:
    """Metadata that another policy did not keep: every id as if it had been seen once, just now."""
    return torch.full_like(ids, {"counts": 1, "last_access_iter": now}[name])


def pending_of(module: MCHManagedCollisionModule) -> PendingIds:
    """What the module will merge into its map at the next eviction."""
    count = module._current_history_buffer_offset
    if module._input_history_buffer_size < 0:
        none = torch.empty(0, dtype=torch.int64)
        return PendingIds(none, dict.fromkeys(_of_pending(module), none))
    return PendingIds(
        module._history_accumulator[:count],
        {name: values[:count] for name, values in module._history_metadata.items()},
    )


def _of_pending(module: MCHManagedCollisionModule) -> list[str]:
    """Metadata that the policy keeps of an id before the id owns a row."""
    return [info.metadata_name for info in module._eviction_policy.metadata_info if info[2]]


def set_pending(
    module: MCHManagedCollisionModule, pending: PendingIds, clock: ManagedClock
) -> None:
    """Continue from `clock` with `pending`, as if this module had seen those ids itself.

    Interval and policy of evictions may be others than those of the module that was saved.
    """
    module._current_iter = clock.iteration
    # TorchRec evicts when exactly an interval has passed, so a longer one would never end.
    overdue_at = clock.iteration - module._eviction_interval
    module._last_eviction_iter = max(clock.last_eviction, overdue_at + 1)
    module._current_iter_tensor.fill_(max(clock.iteration, 0))
    module._current_history_buffer_offset = num_ids = pending.ids_P.numel()
    # Full: the next batch knows how much room it needs. Without an id TorchRec makes the buffers.
    module._input_history_buffer_size = num_ids or -1
    if not num_ids:
        return
    device = module._mch_sorted_raw_ids.device
    module._history_accumulator = pending.ids_P.to(device, copy=True)
    for name in _of_pending(module):
        unknown = _as_if_seen_once(name, pending.ids_P, clock.iteration)
        buffer = pending.metadata.get(name, unknown).to(device, copy=True)
        module.register_buffer(f"_history_{name}", buffer, persistent=False)
        module._history_metadata[name] = buffer


@dataclass(frozen=True)
class Insertion:
    """Which saved rows become which local rows of a shard."""

    saved_rows_K: Tensor
    state: dict[str, Tensor]
    """For `set_by_row`; id k of `saved_rows_K` owns local row k."""
    num_dropped: int
    """Ids that found no room; the least valuable by the eviction policy."""


def insert_ids(
    module: MCHManagedCollisionModule, saved_rows_K: Tensor, saved: dict[str, Tensor]
) -> Insertion:
    """Choose rows of this shard for the saved ids that it owns now (`owned_by`).

    Args:
        module: of this rank, any state.
        saved_rows_K: saved rows of these ids, ascending.
        saved: `ids` and metadata, (K,) each.
    """
    capacity = module._zch_size - 1  # the last row is the unknown row
    num_dropped = max(0, saved_rows_K.numel() - capacity)
    if num_dropped:
        best = _value(saved).argsort(descending=True, stable=True)[:capacity].sort().values
        saved_rows_K, saved = saved_rows_K[best], {name: v[best] for name, v in saved.items()}
    state = {}
    for name, values in saved.items():
        empty = NO_ID if name == "ids" else 0
        state[name] = torch.full((module._zch_size,), empty, dtype=torch.int64)
        state[name][: values.numel()] = values
    return Insertion(saved_rows_K=saved_rows_K, state=state, num_dropped=num_dropped)


def _value(metadata: dict[str, Tensor]) -> Tensor:
    """What the eviction policies compare, in their order."""
    if "counts" not in metadata:
        return metadata["last_access_iter"].double()
    if "last_access_iter" not in metadata:
        return metadata["counts"].double()
    age = metadata["last_access_iter"].max() - metadata["last_access_iter"] + 1
    return metadata["counts"].double() / age

"""What a checkpoint holds: the canonical, sharding-independent layout of a training state.

tables/<table>/weight                     (rows, columns)
tables/<table>/<state>                    (rows, columns), element-wise optimizer state
tables/<table>/<state>@<first>:<last>     (rows,), row-wise state of a block of columns
managed/<table>/ids | <metadata>          (rows,), id of every row and what eviction knows of it
managed/<table>/pending/ids | <metadata>  (P,), ids seen since the last eviction
dense/<parameter>, buffers/<buffer>       as in the model
dense_optimizer/<parameter>/<state>       as in the optimizer
companion/<name>                          as whatever trains beside the model calls it
rng/<rank>/torch | python | numpy | cuda  generator states
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding.checkpoint_files import (
    BUFFERS,
    COMPANION,
    CheckpointManifest,
    RankFacts,
    StoredTable,
)
from embedding.id_map import by_row, clock_of, managed_modules, pending_of, rows_of_module
from embedding.placement import TableShard, flush_caches
from embedding.shard import Sharded
from embedding.stored import StoredTensor
from embedding.tables import in_tables


def rank_facts(sharded: Sharded, rank: int, progress: dict[str, Any]) -> RankFacts:
    """This rank's part of the manifest."""
    modules = managed_modules(sharded.model)
    return RankFacts(
        rank=rank,
        progress=progress,
        table_steps={shard.table.name: int(shard.step_counter) for shard in sharded.shards},
        clocks={name: clock_of(module) for name, module in modules.items()},
        segments={name: rows_of_module(module) for name, module in modules.items()},
    )


def make_manifest(sharded: Sharded, step: int, ranks: list[RankFacts]) -> CheckpointManifest:
    """The manifest without its files."""
    ranks = sorted(ranks, key=lambda facts: facts.rank)
    steps = [(name, step) for facts in ranks for name, step in facts.table_steps.items()]
    groups = sharded.dense_optimizer.param_groups if sharded.dense_optimizer else []
    return CheckpointManifest(
        step=step,
        world_size=len(ranks),
        optimizer=sharded.optimizer_kind,
        plan=sharded.plan,
        tables={
            table.name: StoredTable(
                num_rows=table.num_embeddings,
                num_columns=table.embedding_dim,
                ids=table.ids.kind,
                step=max(step for name, step in steps if name == table.name),
            )
            for table in sharded.schema.tables
        },
        ranks=tuple(ranks),
        dense_scalars={
            name: {key: value for key, value in state.items() if not torch.is_tensor(value)}
            for name, state in _dense_states(sharded).items()
        },
        dense_groups=tuple(
            {key: value for key, value in group.items() if key != "params"} for group in groups
        ),
    )


def capture(sharded: Sharded, ranks: Sequence[RankFacts], rank: int) -> dict[str, StoredTensor]:
    """Views of everything this rank saves."""
    flush_caches(sharded.shards, forget=False)
    tensors = _tables(sharded, rank) | _managed(sharded, ranks, rank)
    tensors |= {f"rng/{rank}/{k}": StoredTensor.whole(v) for k, v in rng_states().items()}
    if rank == 0:
        for name, parameter in sharded.dense_parameters.items():
            tensors[f"dense/{name}"] = StoredTensor.whole(parameter)
        for name, buffer in dense_buffers(sharded).items():
            tensors[f"{BUFFERS}{name}"] = StoredTensor.whole(buffer)
        for name, state in _dense_states(sharded).items():
            for key, value in state.items():
                if torch.is_tensor(value):
                    tensors[f"dense_optimizer/{name}/{key}"] = StoredTensor.whole(value)
    if sharded.companion is not None:
        beside = sharded.companion.tensors()  # on every rank: they may meet in it
        tensors |= {f"{COMPANION}{name}": StoredTensor.whole(v) for name, v in beside.items()}
    # An empty tensor has no block to write; the manifest and the model know it is empty.
    return {name: tensor for name, tensor in tensors.items() if not tensor.empty}


def state_name(state: str, value: Tensor, columns: tuple[int, int]) -> str:
    """Name of an optimizer state within its table."""
    return state if value.dim() == 2 else f"{state}@{columns[0]}:{columns[1]}"


def dense_buffers(sharded: Sharded) -> dict[str, Tensor]:
    """Persistent buffers outside the tables, whose modules add some at the first batch."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in sharded.model.module.named_modules()
        if not in_tables(path)
        for name, buffer in module.named_buffers(recurse=False)
        # The constants of a configuration are built, not restored.
        if name not in module._non_persistent_buffers_set
    }


def rng_states() -> dict[str, Tensor]:
    """State of every generator training may draw from, as tensors."""
    _, words, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    _, keys, position, has_gauss, cached = state
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss]).double(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """The inverse of `rng_states`."""
    torch.set_rng_state(states["torch"])
    gauss = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = states["numpy"].tolist()
    legacy = (
        "MT19937",
        np.array(keys, np.uint32),
        position,
        has_gauss,
        float(states["numpy_gauss"]),
    )
    np.random.set_state(legacy)  # noqa: NPY002
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _tables(sharded: Sharded, rank: int) -> dict[str, StoredTensor]:
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    sizes: dict[str, list[int]] = {}
    for shard in sharded.shards:
        if shard.replicated and rank != 0:
            continue
        for name, value in _named_tensors(shard):
            offset = [shard.row_offset, shard.column_offset][: value.dim()]
            pieces.setdefault(name, []).append((offset, value))
            shape = [shard.table.num_embeddings, shard.table.embedding_dim]
            sizes[name] = shape[: value.dim()]
    return {name: StoredTensor(sizes[name], parts) for name, parts in pieces.items()}


def _named_tensors(shard: TableShard) -> list[tuple[str, Tensor]]:
    prefix = f"tables/{shard.table.name}"
    states = [
        (f"{prefix}/{state_name(state, value, shard.columns)}", value)
        for state, value in shard.states.items()
    ]
    return [(f"{prefix}/weight", shard.weight_RD), *states]


def _managed(sharded: Sharded, ranks: Sequence[RankFacts], rank: int) -> dict[str, StoredTensor]:
    tensors = {}
    for name, module in managed_modules(sharded.model).items():
        first_row = rows_of_module(module)[0]
        num_rows = sharded.schema.table(name).num_embeddings
        for key, values in by_row(module).items():
            tensors[f"managed/{name}/{key}"] = StoredTensor([num_rows], [([first_row], values)])
        counts = [facts.clocks[name].num_pending for facts in ranks]
        start, total = sum(counts[:rank]), sum(counts)
        pending = pending_of(module)
        for key, values in {"ids": pending.ids_P, **pending.metadata}.items():
            stored = StoredTensor([total], [([start], values)])
            tensors[f"managed/{name}/pending/{key}"] = stored
    return tensors


def _dense_states(sharded: Sharded) -> dict[str, dict[str, Any]]:
    if sharded.dense_optimizer is None:
        return {}
    state = sharded.dense_optimizer.state
    return {
        name: state[parameter]
        for name, parameter in sharded.dense_parameters.items()
        if parameter in state
    }

"""Starts a run from another run's checkpoint: what fits is carried over, the rest is named."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from embedding.capture import dense_buffers
from embedding.checkpoint_files import BUFFERS, COMPANION, CheckpointManifest
from embedding.restore import Restorer, sum_dropped
from embedding.row_carry import RowCarry
from embedding.shard import Sharded
from embedding.stored import CheckpointReader
from embedding.warm_start_report import WarmStartReport


def warm_start(
    reader: CheckpointReader,
    manifest: CheckpointManifest,
    sharded: Sharded,
    carries: Mapping[str, RowCarry] | None = None,
    average_of: Callable[[str], str] | None = None,
) -> WarmStartReport:
    """Take over what fits from another run: tables with their optimizer state, dense parameters.

    Under another sparse optimizer tables start with a new state; row-wise Adagrad goes on with the
    row means of Adagrad's, which are what it would have accumulated itself.

    Managed-collision and identity tables may have grown; new tables and parameters keep their
    start values. A hashed table whose size changed is not carried: its ids hash to other rows.

    Args:
        reader: of the checkpoint.
        manifest: of the checkpoint.
        sharded: the model; tables hold their start values.
        carries: tables whose rows have changed their meaning.
        average_of: gives the saved buffer with the average of a dense parameter or buffer, which is
            taken where it was saved. None: this model has averages of its own.

    Raises:
        UserError: such a table has another size than its codebooks.
    """
    restorer = Restorer(reader, manifest, sharded)
    carried, initialised, rows = [], {}, {}
    for table in sharded.schema.tables:
        reason = _why_not_carried(manifest, sharded, table.name)
        if reason is None:
            carry = (carries or {}).get(table.name)
            if carry is not None:
                saved_rows = manifest.tables[table.name].num_rows
                carry.check(table.name, saved_rows, table.num_embeddings)
                rows[table.name] = carry.counts
            restorer.restore_table(table.name, carry)
            carried.append(f"tables/{table.name}")
        else:
            initialised[f"tables/{table.name}"] = reason
    for name, parameter in sharded.dense_parameters.items():
        saved = f"dense/{name}"
        reason = _why_not_read(reader, saved, parameter)
        if reason is None:
            restorer.restore_dense(name)
            restorer.restore_dense_optimizer(name)
            carried.append(saved)
        else:
            initialised[saved] = reason
    for name, buffer in dense_buffers(sharded).items():
        saved = f"{BUFFERS}{name}"
        reason = _why_not_read(reader, saved, buffer)
        if reason is None:
            restorer.restore_buffer(name)
            carried.append(saved)
        else:
            initialised[saved] = reason
    averaged = () if average_of is None else _take_averages(reader, restorer, sharded, average_of)
    if sharded.companion is not None:
        beside = restorer.companion_tensors()
        kept = sharded.companion.warm_start(beside)
        initialised |= {f"{COMPANION}{name}": reason for name, reason in kept.items()}
        names = [n for n in beside if n not in kept and n.split("/")[0] not in kept]
        carried += [f"{COMPANION}{name}" for name in names]
    tables = tuple(name for name in carried if name.startswith("tables/"))
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (reader.consumed, restorer.dropped_ids))
    unread = set(reader.names()).difference(*(consumed for consumed, _ in outcomes))
    return WarmStartReport(
        carried=tuple(carried),
        initialised=initialised,
        ignored=tuple(sorted(name for name in unread if not name.startswith("rng/"))),
        dropped_ids=sum_dropped([dropped for _, dropped in outcomes]),
        weights_only=() if restorer.carries_states else tables,
        from_average=averaged,
        rows=rows,
    )


def _take_averages(
    reader: CheckpointReader,
    restorer: Restorer,
    sharded: Sharded,
    average_of: Callable[[str], str],
) -> tuple[str, ...]:
    """What was published of the other run replaces what it trained with; names of what did."""
    taken = []
    for name, tensor in {**sharded.dense_parameters, **dense_buffers(sharded)}.items():
        average = average_of(name)
        if _why_not_read(reader, f"{BUFFERS}{average}", tensor) is None:
            restorer.restore_from_buffer(average, tensor.detach())
            taken.append(name)
    return tuple(taken)


def _why_not_read(reader: CheckpointReader, saved: str, target: Tensor) -> str | None:
    """None: the saved tensor fits."""
    if saved not in reader.names(saved):
        return "not in the checkpoint"
    was, now = tuple(reader.size(saved)), tuple(target.shape)
    return None if was == (now or (1,)) else f"shape changed from {was} to {now}"


def _why_not_carried(manifest: CheckpointManifest, sharded: Sharded, name: str) -> str | None:
    table, saved = sharded.schema.table(name), manifest.tables.get(name)
    if saved is None:
        return "not in the checkpoint"
    if saved.num_columns != table.embedding_dim:
        return f"embedding_dim changed from {saved.num_columns} to {table.embedding_dim}"
    if saved.ids != table.ids.kind:
        return f"ids changed from {saved.ids} to {table.ids.kind}"
    if table.ids.kind == "hashed" and saved.num_rows != table.num_embeddings:
        return (
            f"num_embeddings changed from {saved.num_rows} to {table.num_embeddings}, so its ids "
            "hash to other rows"
        )
    return None

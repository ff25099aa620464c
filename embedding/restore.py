"""Brings a saved training state into a sharded model, whatever plan and world size saved it."""

# Shapes: R rows and D columns of a shard.

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedding.capture import dense_buffers, set_rng_states, state_name
from embedding.checkpoint_files import BUFFERS, COMPANION, CheckpointManifest
from embedding.config import ManagedCollision
from embedding.errors import UserError
from embedding.id_map import Insertion, insert_ids, managed_modules, set_by_row, set_pending
from embedding.managed_collision import reset_states
from embedding.placement import TableShard, flush_caches
from embedding.row_carry import RowCarry
from embedding.saved_ids import SavedIds
from embedding.shard import Sharded
from embedding.stored import BLOCK_BYTES, CheckpointReader, TensorsBelow

logger = logging.getLogger(__name__)


class Restorer:
    """Reads one checkpoint into one sharded model; every rank runs the same calls."""

    def __init__(
        self, reader: CheckpointReader, manifest: CheckpointManifest, sharded: Sharded
    ) -> None:
        self._reader = reader
        self._manifest = manifest
        self._sharded = sharded
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self.dropped_ids: dict[str, int] = {}
        saved, running = manifest.optimizer, sharded.optimizer_kind
        self._takes_row_means = (saved, running) == ("adagrad", "row_wise_adagrad")
        self.carries_states = saved == running or self._takes_row_means
        """Whether the running optimizer can go on with what the saved one has accumulated."""

    def restore_table(self, name: str, carry: RowCarry | None = None) -> None:
        """Weights, optimizer states and, under managed collision, the id map of one table.

        Another optimizer keeps the states it starts with, unless they follow from those saved.

        Args:
            name: the table.
            carry: where its rows have changed their meaning; not under managed collision.
        """
        shards = [shard for shard in self._sharded.shards if shard.table.name == name]
        flush_caches(shards, forget=False)  # a kernel's other tables keep what is cached
        module = managed_modules(self._sharded.model).get(name)
        insertion = None
        if module is not None:
            table = self._sharded.schema.table(name)
            saved = SavedIds(self._reader, self._manifest, table, module)
            pending, clock = saved.pending()
            if saved.stay:
                set_by_row(module, saved.of_rows(), clock.iteration)
            else:
                insertion = insert_ids(module, *saved.owned())
                self.dropped_ids[name] = insertion.num_dropped
                set_by_row(module, insertion.state, clock.iteration)
            set_pending(module, pending, clock)
        for shard in shards:
            if insertion is not None:
                self._move_rows(shard, insertion)
            elif carry is not None:
                self._carry_rows(shard, carry)
            else:
                self._copy_rows(shard)
            if self.carries_states:
                self._set_step(shard)
        flush_caches(shards, forget=True)

    def restore_dense(self, name: str) -> None:
        """One dense parameter."""
        self._read_whole(f"dense/{name}", self._sharded.dense_parameters[name].data)

    def restore_dense_optimizer(self, name: str) -> None:
        """The dense optimizer's state of one parameter, as far as it had one."""
        optimizer = self._sharded.dense_optimizer
        assert optimizer is not None
        parameter = self._sharded.dense_parameters[name]
        state: dict[str, Any] = dict(self._manifest.dense_scalars.get(name, {}))
        prefix = f"dense_optimizer/{name}/"
        for saved in self._reader.names(prefix):
            value, key = self._reader.read(saved), saved.removeprefix(prefix)
            if key == "step":  # a scalar, saved as one element
                state[key] = value.reshape(()).to(device_of_step(optimizer, parameter))
            else:
                state[key] = value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state

    def restore_dense_groups(self) -> None:
        """Learning rates and other settings of the dense optimizer."""
        if self._sharded.dense_optimizer is None:
            return
        groups = self._sharded.dense_optimizer.param_groups
        for group, saved in zip(groups, self._manifest.dense_groups, strict=True):
            for key, value in saved.items():
                group[key] = tuple(value) if isinstance(value, list) else value

    def restore_buffers(self) -> None:
        """All buffers outside the tables."""
        for name in dense_buffers(self._sharded):
            self.restore_buffer(name)

    def restore_buffer(self, name: str) -> None:
        """One buffer outside the tables."""
        self._read_whole(f"{BUFFERS}{name}", dense_buffers(self._sharded)[name])

    def restore_from_buffer(self, name: str, target: Tensor) -> None:
        """A parameter or buffer of this model from a saved buffer of another name."""
        self._read_whole(f"{BUFFERS}{name}", target)

    def companion_tensors(self) -> TensorsBelow:
        """What was saved of what trains beside the model; it is for that to say what it needs."""
        self._reader.consumed.update(self._reader.names(COMPANION))
        return TensorsBelow(self._reader, COMPANION)

    def restore_rng(self) -> None:
        """This rank's generators; a rank the saved run did not have keeps its own."""
        names = self._reader.names(f"rng/{self._rank}/")
        if names:
            set_rng_states({name.split("/")[-1]: self._reader.read(name) for name in names})
        for rank in range(self._manifest.world_size):
            self._reader.consumed.update(self._reader.names(f"rng/{rank}/"))
        if self._world_size != self._manifest.world_size:
            logger.warning(
                "random generators: saved by %d ranks, restored on the first %d of %d",
                self._manifest.world_size,
                min(self._manifest.world_size, self._world_size),
                self._world_size,
            )

    def _copy_rows(self, shard: TableShard) -> None:
        name, rows = shard.table.name, self._rows_to_copy(shard)
        weight = f"tables/{name}/weight"
        self._reader.read_into(weight, shard.weight_RD[:rows], [*_origin(shard)])
        for state, value in self._states(shard).items():
            if value.dim() == 2:
                self._reader.read_into(f"tables/{name}/{state}", value[:rows], _origin(shard))
            else:
                value[:rows] = self._row_wise(shard, state, shard.row_offset, rows)

    def _carry_rows(self, shard: TableShard, carry: RowCarry) -> None:
        name, (num_rows, width) = shard.table.name, shard.weight_RD.shape
        per_block = max(1, BLOCK_BYTES // (width * shard.weight_RD.element_size()))
        for piece in carry.pieces(shard.row_offset, num_rows, per_block):
            block = torch.empty(piece.num_saved, width, dtype=shard.weight_RD.dtype)
            place = [piece.first_saved, shard.column_offset]
            self._reader.read_into(f"tables/{name}/weight", block, place)
            device = shard.weight_RD.device
            shard.weight_RD[piece.rows.to(device)] = block[piece.sources].to(device)
            rows, sources = piece.rows[piece.carried].to(device), piece.sources[piece.carried]
            for state, value in self._states(shard).items():
                if value.dim() == 2:
                    saved = torch.empty(piece.num_saved, width, dtype=value.dtype)
                    self._reader.read_into(f"tables/{name}/{state}", saved, place)
                else:
                    saved = self._row_wise(shard, state, piece.first_saved, piece.num_saved)
                value[rows] = saved[sources].to(value)

    def _states(self, shard: TableShard) -> dict[str, Tensor]:
        return shard.states if self.carries_states else {}

    def _rows_to_copy(self, shard: TableShard) -> int:
        saved = self._manifest.tables[shard.table.name].num_rows
        return max(0, min(shard.weight_RD.shape[0], saved - shard.row_offset))

    def _row_wise(self, shard: TableShard, state: str, first_row: int, rows: int) -> Tensor:
        """Row-wise accumulators of the shard's columns from those of the saved column blocks.

        An accumulator sums mean squares over a block's columns, so the one of merged blocks is
        their mean weighted by width; of a part of a block only the block's own mean is known.
        """
        if self._takes_row_means:
            return self._row_means(shard, state, first_row, rows)
        first, last = shard.columns
        total = torch.zeros(rows)
        blocks = self._column_blocks(shard.table.name, state)
        for name, (start, stop) in blocks:
            overlap = min(last, stop) - max(first, start)
            part = torch.empty(rows)
            self._reader.read_into(name, part, [first_row])
            if (start, stop) == (first, last):
                return part
            if overlap > 0:
                total += part * (overlap / (last - first))
        if shard.row_offset == 0:
            logger.info(
                "table %s: %s of columns %d:%d combined from saved column blocks %s",
                shard.table.name,
                state,
                first,
                last,
                [span for _, span in blocks],
            )
        return total

    def _row_means(self, shard: TableShard, state: str, first_row: int, rows: int) -> Tensor:
        """Of Adagrad's sums of squares: the sums of mean squares, which the row-wise one keeps."""
        width = shard.weight_RD.shape[1]
        means = torch.empty(rows)
        per_block = max(1, BLOCK_BYTES // (width * means.element_size()))
        for start in range(0, rows, per_block):
            block = torch.empty(min(per_block, rows - start), width)
            place = [first_row + start, shard.column_offset]
            self._reader.read_into(f"tables/{shard.table.name}/{state}", block, place)
            means[start : start + per_block] = block.mean(dim=1)
        return means

    def _column_blocks(self, table: str, state: str) -> list[tuple[str, tuple[int, int]]]:
        blocks = []
        for name in self._reader.names(f"tables/{table}/{state}@"):
            start, stop = name.rsplit("@", 1)[1].split(":")
            blocks.append((name, (int(start), int(stop))))
        if not blocks:
            raise KeyError(f"tables/{table}/{state}@*")
        return blocks

    def _move_rows(self, shard: TableShard, insertion: Insertion) -> None:
        table = shard.table.name
        unknown = torch.tensor([stop - 1 for _, stop in self._manifest.segments(table)])
        num_kept = insertion.saved_rows_K.numel()
        unused = torch.arange(num_kept, shard.weight_RD.shape[0], device=shard.weight_RD.device)
        reset_states(list(shard.states.values()), unused)
        targets = {"weight": shard.weight_RD}
        for state, value in self._states(shard).items():
            whole = self._takes_row_means  # managed tables have no column shards
            targets[state if whole else state_name(state, value, shard.columns)] = value
        for key, target in targets.items():
            unknown_sum = torch.zeros_like(target[-1:], device="cpu")
            for start, block in self._reader.row_blocks(f"tables/{table}/{key}"):
                stop = start + block.shape[0]
                block = block if block.dim() == target.dim() else block.mean(dim=1)
                first, last = torch.searchsorted(
                    insertion.saved_rows_K, torch.tensor([start, stop])
                ).tolist()
                rows = insertion.saved_rows_K[first:last] - start
                target[first:last] = block[rows].to(target.device)
                inside = unknown[(unknown >= start) & (unknown < stop)] - start
                unknown_sum += block[inside].sum(dim=0, keepdim=True)
            # Every shard has one unknown row; the new ones start from the mean of the old ones.
            target[-1:] = (unknown_sum / unknown.numel()).to(target.device)

    def _set_step(self, shard: TableShard) -> None:
        step = self._manifest.tables[shard.table.name].step
        if shard.tbe is not None:
            tbe: Any = shard.tbe
            tbe.iter_cpu.fill_(step)
        shard.step_counter.fill_(step)

    def _read_whole(self, name: str, target: Tensor) -> None:
        flat = target.reshape(1) if target.dim() == 0 else target
        if flat.numel():
            self._reader.read_into(name, flat, [0] * flat.dim())


def restore_all(
    reader: CheckpointReader, manifest: CheckpointManifest, sharded: Sharded
) -> dict[str, int]:
    """Restore everything, exactly; managed-collision tables may have another number of rows.

    Returns:
        Ids that found no room in a smaller or differently split table, by table, over all ranks.

    Raises:
        UserError: if the model needs what was not saved, or something saved was not needed.
    """
    problems = list(_differences(manifest, sharded))
    restorer = Restorer(reader, manifest, sharded)
    if not problems:
        try:
            for table in sharded.schema.tables:
                restorer.restore_table(table.name)
            for name in sharded.dense_parameters:
                restorer.restore_dense(name)
                restorer.restore_dense_optimizer(name)
            restorer.restore_dense_groups()
            restorer.restore_buffers()
            if sharded.companion is not None:
                sharded.companion.load(restorer.companion_tensors())
            restorer.restore_rng()
        except (KeyError, ValueError) as error:
            problems.append(f"missing or of another shape: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (problems, reader.consumed, restorer.dropped_ids))
    problems = sorted({problem for found, _, _ in outcomes for problem in found})
    unread = set(reader.names()).difference(*(consumed for _, consumed, _ in outcomes))
    if not problems and unread:
        problems = [f"saved but not needed: {name}" for name in sorted(unread)]
    if problems:
        raise UserError(
            "the checkpoint does not fit the model: " + "; ".join(problems) + "; resume with the "
            "configuration that wrote it, or start a new run from it as a warm start"
        )
    return sum_dropped([dropped for _, _, dropped in outcomes])


def _differences(manifest: CheckpointManifest, sharded: Sharded) -> Iterator[str]:
    if manifest.optimizer != sharded.optimizer_kind:
        yield f"sparse optimizer was {manifest.optimizer}, is {sharded.optimizer_kind}"
    for table in sharded.schema.tables:
        saved = manifest.tables.get(table.name)
        if saved is None:
            yield f"table {table.name} was not saved"
        elif saved.ids != table.ids.kind or saved.num_columns != table.embedding_dim:
            yield (
                f"table {table.name} was {saved.ids} with {saved.num_columns} columns, is "
                f"{table.ids.kind} with {table.embedding_dim}"
            )
        elif saved.num_rows != table.num_embeddings and not isinstance(table.ids, ManagedCollision):
            yield f"table {table.name} had {saved.num_rows} rows, has {table.num_embeddings}"


def sum_dropped(ranks: list[dict[str, int]]) -> dict[str, int]:
    """Ids without room by table, over all ranks; rank 0 logs them."""
    totals: dict[str, int] = {}
    for dropped in ranks:
        for table, count in dropped.items():
            totals[table] = totals.get(table, 0) + count
    for table, count in totals.items():
        if count and dist.get_rank() == 0:
            logger.warning("table %s: %d ids found no room and were evicted", table, count)
    return totals


def device_of_step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> torch.device:
    """Where an optimizer wants its step counters: fused kernels read them beside the parameter."""
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            on_device = group.get("fused") or group.get("capturable")
            return parameter.device if on_device else torch.device("cpu")
    raise AssertionError("the optimizer does not hold the parameter")


def _origin(shard: TableShard) -> list[int]:
    return [shard.row_offset, shard.column_offset]

"""Id maps of managed-collision tables in a checkpoint: what one rank needs of them, by blocks."""

# Shapes: K ids that this rank owns, P of them seen since the last eviction.

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.modules.mc_modules import MCHManagedCollisionModule

from embedding.checkpoint_files import CheckpointManifest, ManagedClock
from embedding.config import TableConfig
from embedding.id_map import PendingIds, owned_by, rows_of_module
from embedding.stored import CheckpointReader


class SavedIds:
    """The id map of one table as it was saved, for this rank's collision module."""

    def __init__(
        self,
        reader: CheckpointReader,
        manifest: CheckpointManifest,
        table: TableConfig,
        module: MCHManagedCollisionModule,
    ) -> None:
        self._reader = reader
        self._prefix = f"managed/{table.name}/"
        segments = manifest.segments(table.name)
        self._clocks = [facts.clocks[table.name] for facts in manifest.ranks]
        self._rows = rows_of_module(module)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self.stay = (
            len(segments) == self._world_size
            and segments[self._rank] == self._rows
            and segments[-1][1] == table.num_embeddings
        )
        """Whether every id keeps its row: as many ranks, and each of as many rows."""

    def of_rows(self) -> dict[str, Tensor]:
        """`ids` and metadata of the module's rows, for ids that stay."""
        start, stop = self._rows
        return self._slices(self._prefix, start, stop)

    def owned(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Saved rows (K,) of the ids that this rank owns now; `ids` and metadata, (K,) each."""
        return self._owned(self._prefix)

    def pending(self) -> tuple[PendingIds, ManagedClock]:
        """Ids that this rank owns now and has to merge at the next eviction; the counters."""
        prefix = f"{self._prefix}pending/"
        if not self._keys(prefix):  # an empty tensor is not saved
            saved = {"ids": torch.empty(0, dtype=torch.int64)}
        elif self.stay:
            start = sum(clock.num_pending for clock in self._clocks[: self._rank])
            saved = self._slices(prefix, start, start + self._clocks[self._rank].num_pending)
        else:
            _, saved = self._owned(prefix)
        ids_P = saved.pop("ids")
        clock = ManagedClock(
            iteration=max(clock.iteration for clock in self._clocks),
            last_eviction=max(clock.last_eviction for clock in self._clocks),
            num_pending=ids_P.numel(),
        )
        return PendingIds(ids_P, saved), self._clocks[self._rank] if self.stay else clock

    def _slices(self, prefix: str, start: int, stop: int) -> dict[str, Tensor]:
        saved = {}
        for key in self._keys(prefix):
            saved[key] = torch.empty(stop - start, dtype=torch.int64)
            self._reader.read_into(prefix + key, saved[key], [start])
        return saved

    def _owned(self, prefix: str) -> tuple[Tensor, dict[str, Tensor]]:
        keys = self._keys(prefix)
        rows, kept = [], []
        # All of them are int64: their blocks have the same rows.
        for blocks in zip(*(self._reader.row_blocks(prefix + key) for key in keys), strict=True):
            first_row = blocks[0][0]
            part = {key: block for key, (_, block) in zip(keys, blocks, strict=True)}
            mine = owned_by(part["ids"], self._rank, self._world_size)
            rows.append(mine + first_row)
            kept.append({key: values[mine] for key, values in part.items()})
        return torch.cat(rows), {key: torch.cat([part[key] for part in kept]) for key in keys}

    def _keys(self, prefix: str) -> list[str]:
        keys = (name.removeprefix(prefix) for name in self._reader.names(prefix))
        return [key for key in keys if "/" not in key]

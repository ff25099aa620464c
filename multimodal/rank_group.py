"""The training ranks as those who share work: cut in parts, gathered again, added up."""

# Shapes: N rows of all ranks, D columns.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PADDING = -1


class RankGroup:
    """A process group of the ranks, or one process without any. All ranks make the same calls."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: None without a process group."""
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1

    def close(self, *, is_orderly: bool) -> None:
        """End the process group: its threads and connections would stay as long as the process.

        Args:
            is_orderly: all ranks call it. False: this rank has failed, and waits for nobody.
        """
        if self._group is not None and (is_orderly or self.world_size == 1):
            dist.destroy_process_group(self._group)

    def share(self, of_all: Tensor) -> Tensor:
        """This rank's consecutive part of rows that all ranks know; a view, may be empty."""
        size = -(-len(of_all) // self.world_size)
        return of_all[self.rank * size : (self.rank + 1) * size]

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The inverse of `share`: the `count` rows (N, D) of all ranks."""
        if self.world_size == 1:
            return own
        size = -(-count // self.world_size)
        padded = torch.nn.functional.pad(own, (0, 0, 0, size - len(own))).contiguous()
        gathered = padded.new_empty(size * self.world_size, padded.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        return gathered[:count]

    def add_up(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)

    def distinct(self, ids: Tensor, bound: int | None) -> Tensor:
        """The distinct ids >= 0 of all ranks, ascending.

        Args:
            ids: this rank's, distinct and ascending.
            bound: of their number on every rank; None: the ranks exchange their numbers first.
        """
        if self.world_size == 1:
            return ids
        if bound is None:
            size = ids.new_tensor([len(ids)])
            dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self._group)
            bound = int(size)
        padded = torch.nn.functional.pad(ids, (0, bound - len(ids)), value=_PADDING)
        gathered = ids.new_empty(self.world_size * bound)
        dist.all_gather_into_tensor(gathered, padded, group=self._group)
        found = torch.unique(gathered)
        return found[found != _PADDING]

    def said_by_first(self, value: Any) -> Any:
        """The value of rank 0, which may be any object; others' are ignored."""
        if self.world_size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self._group)
        return said[0]

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)

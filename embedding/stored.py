"""Logical tensors in a distributed checkpoint: written by shards and blocks, read by any rectangle.

The files are torch.distributed.checkpoint's. Shards are written as blocks of rows, so that reading
never holds more than one block beside its target.
"""

import bisect
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from embedding.checkpoint_files import BUFFERS, COMPANION, read_manifest

BLOCK_BYTES = 32 << 20


class StoredTensor:
    """A tensor of `size` of which this rank writes some pieces; ranks together tile it."""

    def __init__(self, size: Sequence[int], pieces: Sequence[tuple[Sequence[int], Tensor]]) -> None:
        """`pieces`: (offset of the piece in every dimension, tensor)."""
        self._size = torch.Size(size)
        self._blocks = {
            torch.Size(place): block
            for offset, piece in pieces
            for place, block in _row_blocks(tuple(offset), piece)
        }

    @classmethod
    def whole(cls, tensor: Tensor) -> "StoredTensor":
        """All of it from this rank; a scalar becomes one element."""
        tensor = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        return cls(tensor.shape, [([0] * tensor.dim(), tensor)])

    def staged(self) -> "StoredTensor":
        """A copy in host memory that training cannot change."""
        copy = StoredTensor(self._size, [])
        copy._blocks = {
            place: block.detach().to("cpu", copy=True) for place, block in self._blocks.items()
        }
        return copy

    @property
    def empty(self) -> bool:
        """Whether the whole tensor has no element."""
        return 0 in self._size

    def block(self, place: torch.Size) -> Tensor:
        """The block at an offset."""
        return self._blocks[place]

    def __create_write_items__(self, name: str, _self: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, place),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=place, sizes=block.size()),
                    properties=TensorProperties(dtype=block.dtype),
                    size=self._size,
                ),
            )
            for place, block in self._blocks.items()
        ]


class StoredTensorPlanner(DefaultSavePlanner):
    """Saves a flat dict of `StoredTensor`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The block to write."""
        assert index.offset is not None
        stored: StoredTensor = self.state_dict[index.fqn]
        return stored.block(index.offset)


class TensorsBelow(Mapping[str, Tensor]):
    """Tensors of a checkpoint whose names start with a prefix, without it.

    Each is read when it is asked for, every time: not all of what trains beside a model is wanted.
    """

    def __init__(self, reader: "CheckpointReader", prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read(self._prefix + name)

    def __contains__(self, name: object) -> bool:
        return name in [*self]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._reader.names(self._prefix))

    def __len__(self) -> int:
        return len(self._reader.names(self._prefix))


class CheckpointReader:
    """Reads logical tensors of one checkpoint directory; needs no process group."""

    def __init__(self, directory: Path) -> None:
        self._reader = FileSystemReader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        self._chunks: dict[str, _ChunksByRow] = {}
        self.consumed: set[str] = set()
        """Names read so far."""

    def names(self, prefix: str = "") -> list[str]:
        """Names of all tensors that start with `prefix`."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def size(self, name: str) -> torch.Size:
        """Shape of the whole tensor; raises KeyError if it was not saved."""
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        """Element type."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor in host memory."""
        target = torch.empty(self.size(name), dtype=self.dtype(name))
        self.read_into(name, target, [0] * target.dim())
        return target

    def read_into(self, name: str, target: Tensor, offset: Sequence[int]) -> None:
        """Fill `target` with the rectangle that starts at `offset`; one stored block at a time.

        Raises:
            KeyError: if no such tensor was saved.
            ValueError: if the saved blocks do not cover the rectangle.
        """
        plan = [item for item in self._read_items(name, target.size(), tuple(offset)) if item]
        covered = sum(functools.reduce(operator.mul, item.lengths, 1) for item in plan)
        if covered != target.numel():
            raise ValueError(
                f"{name}: the saved blocks of {tuple(self.size(name))} do not cover "
                f"{tuple(target.size())} at {tuple(offset)}"
            )
        self._reader.read_data(LoadPlan(plan), _Into(target))  # type: ignore[arg-type]
        self.consumed.add(name)

    def row_blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the whole tensor at full width, a bounded number of rows a time."""
        size = self.size(name)
        row_bytes = functools.reduce(operator.mul, size[1:], 1) * self.dtype(name).itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, size[0], step):
            rows = min(step, size[0] - start)
            block = torch.empty((rows, *size[1:]), dtype=self.dtype(name))
            self.read_into(name, block, [start] + [0] * (len(size) - 1))
            yield start, block

    def _read_items(
        self, name: str, size: torch.Size, offset: tuple[int, ...]
    ) -> Iterator[ReadItem | None]:
        if name not in self._chunks:
            self._chunks[name] = _ChunksByRow(self._tensors[name].chunks)
        for chunk in self._chunks[name].meeting(offset[0], offset[0] + size[0]):
            starts = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            stops = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, size, chunk.offsets, chunk.sizes, strict=True)
            ]
            lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
            if any(length <= 0 for length in lengths):
                continue
            yield ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(name),
                dest_offsets=torch.Size([s - o for s, o in zip(starts, offset, strict=True)]),
                storage_index=MetadataIndex(name, chunk.offsets),
                storage_offsets=torch.Size(
                    [s - o for s, o in zip(starts, chunk.offsets, strict=True)]
                ),
                lengths=torch.Size(lengths),
            )


class _ChunksByRow:
    """The stored blocks of one tensor, of which a large table has tens of thousands."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: tuple(chunk.offsets))
        self._starts = [chunk.offsets[0] for chunk in self._chunks]
        self._most_rows = max(chunk.sizes[0] for chunk in chunks)

    def meeting(self, start: int, stop: int) -> list[ChunkStorageMetadata]:
        """Blocks that may have some of these rows: all that do, and few others."""
        first = bisect.bisect_right(self._starts, start - self._most_rows)
        return self._chunks[first : bisect.bisect_left(self._starts, stop)]


class _Into:
    """The part of a LoadPlanner that `FileSystemReader.read_data` uses for tensors."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """The tensor was written in place."""


def _row_blocks(offset: tuple[int, ...], piece: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    row_bytes = piece[:1].numel() * piece.element_size()
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, piece.shape[0], step):
        yield (offset[0] + start, *offset[1:]), piece[start : start + step]


def read_tables(directory: Path) -> Iterator[tuple[str, Iterator[tuple[int, Tensor]]]]:
    """(table, its rows as (first row, block)) of one checkpoint, without a process group.

    A bounded number of rows is in memory at a time; take the blocks before the next table.
    """
    reader = CheckpointReader(directory)
    for table in read_manifest(directory).tables:
        yield table, reader.row_blocks(f"tables/{table}/weight")


def read_dense(directory: Path) -> dict[str, Tensor]:
    """All dense parameters and buffers of one checkpoint, by name in the model."""
    reader = CheckpointReader(directory)
    names = reader.names("dense/") + reader.names(BUFFERS)
    return {name.split("/", 1)[1]: reader.read(name) for name in names}


def read_companion(directory: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of what trained beside the model whose names start with `prefix`, without it."""
    reader = CheckpointReader(directory)
    start = COMPANION + prefix
    return {name.removeprefix(start): reader.read(name) for name in reader.names(start)}


def read_companion_rows(directory: Path, name: str) -> Iterator[tuple[int, Tensor]]:
    """One tensor of what trained beside the model as (first row, block), like `read_tables`."""
    return CheckpointReader(directory).row_blocks(COMPANION + name)


def take_rows(blocks: Iterable[tuple[int, Tensor]], rows_N: Tensor) -> Tensor:
    """Some rows (N, ...) of what comes in blocks, in any order and also several times."""
    found: dict[int, Tensor] = {}
    for start, block in blocks:
        for at in rows_N[(rows_N >= start) & (rows_N < start + len(block))].tolist():
            found[at] = block[at - start].clone()
    return torch.stack([found[at] for at in rows_N.tolist()])


def read_id_map(directory: Path, table: str) -> Tensor:
    """Id of every row of a managed-collision table, (rows,); `hashing.NO_ID` where none owns it.

    `read_manifest(directory).segments(table)` has the shards, whose last rows are unknown rows.
    """
    return CheckpointReader(directory).read(f"managed/{table}/ids")

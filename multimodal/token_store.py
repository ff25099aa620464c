"""Lower-layer tokens of items on disk: written once, memory-mapped by training.

    DIR/store.json                 which tower the tokens come from
    DIR/sound.json                 size and time of change of parts whose checksum was compared
    DIR/part-X.safetensors         tokens (N, L, H), padded to the part's longest item
    DIR/part-X.parquet             item_id, digest, row, length, fault, is_cut - written last

One directory holds the tokens of one tower fingerprint. An entry is (item_id, digest): an item
whose text or image changed gets a new entry, and the old one stays, since artifacts of earlier days
point to it. Nothing is evicted; delete a directory to free its space. A part without its Parquet
file is what a killed process left, and is removed when the store is opened for writing.

Shapes: N items of a part, L token positions, H width of the tower.
"""

import uuid
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from multimodal.content_config import Precision

NO_ROW = -1
"""Row of an item that has no tokens."""

_STORE_FILE = "store.json"
_SOUND_FILE = "sound.json"
_CHUNK_BYTES = 1 << 20
_ENTRIES = pa.schema(
    [
        ("item_id", pa.int64()),
        ("digest", pa.int64()),
        ("row", pa.int32()),
        ("length", pa.int32()),
        ("fault", pa.string()),
        ("is_cut", pa.bool_()),
    ]
)
DTYPES: dict[Precision, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Of stored tokens."""


CheckedPart = tuple[str, str | None]
"""Name of a part, and what is wrong with it."""
RunChecks = Callable[[list[str]], Iterable[CheckedPart]]
"""Runs `check_part` for parts, and gives what it finds in any order."""


@dataclass(frozen=True)
class PartTokens:
    """Items to write together; those with a fault have no tokens."""

    item_ids_N: Int64Array
    digests_N: Int64Array
    faults: list[str | None]
    tokens_MLH: Tensor
    """Of the items without a fault, in their order."""
    lengths_M: Tensor
    is_cut: list[bool]
    """M of them."""


class _Owner(StrictConfig):
    """`store.json`; version 1."""

    schema_version: Literal[1] = 1
    fingerprint: str
    """Of the tower."""


class _SoundParts(StrictConfig):
    """`sound.json`; version 1."""

    schema_version: Literal[1] = 1
    parts: dict[str, tuple[int, ...]]
    """Size and time of change of every part when it was compared last."""


class TokenStore:
    """The tokens of one tower.

    Args:
        directory: of the store; made where it is not there.
        fingerprint: of the tower.
        precision: of the stored values.

    Raises:
        UserError: the directory belongs to another tower.
    """

    def __init__(self, directory: Path, fingerprint: str, precision: Precision) -> None:
        self.directory = directory
        self.dtype = DTYPES[precision]
        path = directory / _STORE_FILE
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            _write_text(path, _Owner(fingerprint=fingerprint).model_dump_json())
        try:
            found = _Owner.model_validate_json(path.read_text()).fingerprint
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged; delete {directory}, and the content stage computes it anew"
            ) from error
        if found != fingerprint:
            raise UserError(
                f"{directory} holds tokens of tower {found}, not of {fingerprint}; delete it, and "
                "the content stage computes them anew"
            )

    def entries(self) -> pa.Table:
        """All entries, with their `part`; of two for one (item_id, digest), both.

        Raises:
            UserError: a list of entries is damaged.
        """
        tables = []
        for path in sorted(self.directory.glob("part-*.parquet")):
            try:
                table = pq.read_table(path, schema=_ENTRIES)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, str(error).splitlines()[0]) from error
            names = pa.array([path.stem] * len(table), pa.string())
            tables.append(table.append_column("part", names.dictionary_encode()))
        if not tables:
            empty = pa.array([], pa.string()).dictionary_encode()
            return _ENTRIES.empty_table().append_column("part", empty)
        return pa.concat_tables(tables).unify_dictionaries()

    def append(self, part: PartTokens) -> str:
        """Write a part; it is there once this returns, or not at all.

        Returns:
            The part's name.
        """
        name = f"part-{uuid.uuid4().hex[:16]}"
        has_tokens_N = np.array([fault is None for fault in part.faults])
        row_N = np.where(has_tokens_N, np.cumsum(has_tokens_N) - 1, NO_ROW)
        length_N, cut_N = np.zeros(len(row_N), np.int32), np.zeros(len(row_N), bool)
        length_N[has_tokens_N], cut_N[has_tokens_N] = part.lengths_M.numpy(), part.is_cut
        tokens = self.directory / f"{name}.safetensors"
        partial = tokens.with_suffix(".partial")
        save_file({"tokens": part.tokens_MLH.to(self.dtype).contiguous()}, partial)
        checksum = _crc32(partial)
        size = partial.stat().st_size
        partial.replace(tokens)
        columns = [part.item_ids_N, part.digests_N, row_N, length_N, part.faults, cut_N]
        table = pa.table(
            [pa.array(column, field.type) for column, field in zip(columns, _ENTRIES, strict=True)],
            schema=_ENTRIES.with_metadata({"bytes": str(size), "crc32": str(checksum)}),
        )
        listed = self.directory / f"{name}.parquet"
        pq.write_table(table, listed.with_suffix(".partial"))
        listed.with_suffix(".partial").replace(listed)
        return name

    def remove_unfinished(self) -> int:
        """Delete what killed processes left; only while no other process writes.

        Returns:
            The number of files.
        """
        listed = {path.stem for path in self.directory.glob("part-*.parquet")}
        left = [path for path in self.directory.glob("part-*") if path.stem not in listed]
        for path in left:
            path.unlink()
        return len(left)

    def check(self, names: Iterable[str], run: RunChecks | None = None) -> int:
        """Compare parts with their checksums: those that were not yet, or have changed since.

        Changed is what has another size or time of change than when it was compared last. Only
        while no other process does so.

        Args:
            names: of the parts.
            run: how many parts are read; None: one after the other, here.

        Returns:
            The number of parts that were read.

        Raises:
            UserError: a part differs or is not there.
        """
        sound, num_read = self._sound(), 0
        seen = {name: _seen(self.directory / f"{name}.safetensors") for name in names}
        todo = [name for name in seen if sound.get(name) != seen[name]]
        found = (check_part(n, self.directory) for n in todo) if run is None else run(todo)
        try:
            for name, fault in found:
                if fault is not None:
                    raise _damaged(self.directory / f"{name}.safetensors", fault)
                sound[name] = seen[name]
                num_read += 1
        finally:
            if num_read:
                text = _SoundParts(parts=sound).model_dump_json()
                _write_text(self.directory / _SOUND_FILE, text)
        return num_read

    def _sound(self) -> dict[str, tuple[int, ...]]:
        """Size and time of change of every part when it was compared last."""
        path = self.directory / _SOUND_FILE
        if not path.exists():
            return {}
        try:
            return _SoundParts.model_validate_json(path.read_text()).parts
        except ValidationError:
            return {}  # then all are compared

    def open(self, name: str) -> Tensor:
        """Tokens (N, L, H) of a part, memory-mapped.

        Raises:
            UserError: the file is damaged or not there, or the process has too many mappings.
        """
        path = self.directory / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tokens: Tensor = file.get_tensor("tokens")
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path, str(error).splitlines()[0]) from error
        except MemoryError as error:
            raise UserError(
                f"{path} cannot be mapped into memory ({error}): the process has too many files "
                "mapped, or no address space left; raise content.tokens.items_per_part (larger "
                "parts are fewer), delete the store and the directories content/ that point to it, "
                "and run the content stage again; or raise vm.max_map_count of the host"
            ) from error
        return tokens


def damaged_parts(directory: Path) -> list[UserError]:
    """What is wrong in a store, after reading all of it."""
    found = []
    for path in sorted(directory.glob("part-*.parquet")):
        fault = part_fault(directory, path.stem)
        if fault is not None:
            found.append(_damaged(path.with_suffix(".safetensors"), fault))
    return found


def check_part(name: str, directory: Path) -> CheckedPart:
    """Read a part; a task of its own where there are many."""
    return name, part_fault(directory, name)


def part_fault(directory: Path, name: str) -> str | None:
    """Why the tokens of a part are not those that were written; None if they are. Reads them."""
    path = directory / f"{name}.safetensors"
    if not path.is_file():
        return "it is not there"
    try:
        recorded = pq.read_schema(directory / f"{name}.parquet").metadata or {}
    except (pa.ArrowException, OSError) as error:
        return f"its list of items cannot be read: {str(error).splitlines()[0]}"
    size = path.stat().st_size
    if str(size).encode() != recorded.get(b"bytes"):
        return f"it has {size} bytes, not as many as were written"
    if str(_crc32(path)).encode() != recorded.get(b"crc32"):
        return "its checksum differs from what was written"
    return None


def _seen(path: Path) -> tuple[int, ...]:
    """Size and time of change; empty where there is no file."""
    if not path.is_file():
        return ()
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} of the token store is damaged ({why}); delete {path.stem}.* there and the "
        "directory content/ of this date, and run again: the items of this part are computed anew"
    )


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
    partial.write_text(text)
    partial.replace(path)

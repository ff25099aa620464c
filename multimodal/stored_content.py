"""Content of a day's items: an index over the token stores, and the reader of training.

    content.parquet   item_id (ascending), and for each modality its part, row and length
    content.json      for each modality its store, tower fingerprint and the names of the parts

A content row is a position in the index; `NO_CONTENT` stands for an item that is not in it.

Shapes: N items of the index, U rows to read, L token positions, H width of a tower.
"""

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.items import NO_CONTENT
from embedding.raw_ids import Int64Array
from multimodal.content_config import ContentConfig, Precision
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.token_store import NO_ROW, TokenStore
from multimodal.tower_files import tower_fingerprint

_INDEX = "content.parquet"
_DESCRIPTION = "content.json"
_MOST_OPEN = 1 << 14
"""Parts of one modality that are open at a time: Linux allows a process 65,530 mappings."""


class StoredModality(StrictConfig):
    """Where the tokens of one modality lie."""

    store: str
    """Directory below that of all stores."""
    fingerprint: str
    precision: Precision
    hidden_size: int
    parts: tuple[str, ...]


class StoredContent(StrictConfig):
    """Description of an index; version 1."""

    schema_version: Literal[1] = 1
    num_items: int
    modalities: dict[str, StoredModality]


@dataclass(frozen=True)
class Places:
    """Where the tokens of N items lie; `NO_ROW` in all columns of an item that has none."""

    part_N: np.ndarray
    row_N: np.ndarray
    length_N: np.ndarray


def write_index(
    directory: Path, item_ids_N: Int64Array, content: StoredContent, places: Mapping[str, Places]
) -> None:
    """Write the index of a day.

    Args:
        directory: an existing one.
        item_ids_N: ascending.
        content: describes the stores.
        places: by modality.
    """
    columns = {"item_id": pa.array(item_ids_N, pa.int64())}
    for name, place in places.items():
        for part, values in (
            ("part", place.part_N),
            ("row", place.row_N),
            ("length", place.length_N),
        ):
            columns[f"{name}_{part}"] = pa.array(values, pa.int32())
    pq.write_table(pa.table(columns), directory / _INDEX, compression="zstd")
    (directory / _DESCRIPTION).write_text(content.model_dump_json(indent=2))


class ContentReader:
    """Reads stored tokens by content row. Parts are memory-mapped when they are first read.

    Args:
        directory: holds the index.
        stores: directory of all token stores.
    """

    def __init__(self, directory: Path, stores: Path) -> None:
        self.content = StoredContent.model_validate_json((directory / _DESCRIPTION).read_text())
        self.identity = _identity(directory)
        """Equal for equal items with equal tokens."""
        table = pq.read_table(directory / _INDEX)
        self.item_ids_N: Int64Array = table["item_id"].to_numpy()
        """Raw ids, ascending; a position is a content row."""
        self._modalities = {
            name: _ModalityReader(table, name, stored, stores)
            for name, stored in self.content.modalities.items()
        }

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.item_ids_N)

    def require_towers(self, config: ContentConfig) -> None:
        """Refuse towers of this host that are not those whose tokens are stored.

        Raises:
            UserError: their files differ, or are not there.
        """
        for name, tower in config.towers.items():
            stored, own = self.content.modalities[name].fingerprint, tower_fingerprint(name, tower)
            if own != stored:
                raise UserError(
                    f"the {name} tower {tower.model!r} of host {socket.gethostname()} has "
                    f"fingerprint {own}, but the stored tokens come from one with fingerprint "
                    f"{stored}: its files differ from those that the content stage read; give all "
                    "hosts the same files and run again (the stage encodes anew where they changed)"
                )

    def rows_of(self, raw_ids: Int64Array) -> Int64Array:
        """Content rows of raw item ids; `NO_CONTENT` for those that are not in the index."""
        if not self.num_items:
            return np.full(len(raw_ids), NO_CONTENT, np.int64)
        at = np.searchsorted(self.item_ids_N, raw_ids).clip(max=self.num_items - 1)
        return np.where(self.item_ids_N[at] == raw_ids, at, NO_CONTENT)

    def read(self, rows_U: Tensor) -> TokenBatch:
        """Tokens of these items, on the CPU; nothing of those whose row is `NO_CONTENT`.

        Raises:
            UserError: a part of a store is damaged or not there.
        """
        rows_U = rows_U.to("cpu", torch.int64)
        return TokenBatch({name: reader.read(rows_U) for name, reader in self._modalities.items()})


class _ModalityReader:
    def __init__(self, table: pa.Table, name: str, stored: StoredModality, stores: Path) -> None:
        self.store = TokenStore(stores / stored.store, stored.fingerprint, stored.precision)
        self.parts = stored.parts
        self.hidden_size = stored.hidden_size
        # A mapping each, and the system allows a process so many of them only.
        self.tokens = lru_cache(_MOST_OPEN)(self._open)
        # One more entry behind the last: where NO_CONTENT, which is -1, points to.
        self.part_N, self.row_N, self.length_N = (
            torch.cat([torch.tensor(table[f"{name}_{c}"].to_numpy()).long(), torch.tensor([end])])
            for c, end in (("part", NO_ROW), ("row", NO_ROW), ("length", 0))
        )

    def read(self, rows_U: Tensor) -> ModalityTokens:
        part_U, row_U, length_U = self.part_N[rows_U], self.row_N[rows_U], self.length_N[rows_U]
        longest = max(1, int(length_U.max())) if len(rows_U) else 1
        mask_UL = torch.arange(longest) < length_U.unsqueeze(1)
        touched = [part for part in part_U.unique().tolist() if part != NO_ROW]
        tokens_ULH = torch.zeros(len(rows_U), longest, self.hidden_size, dtype=self.store.dtype)
        for part in touched:
            at = (part_U == part).nonzero().squeeze(1)
            stored_NLH = self.tokens(part)[:, :longest]
            tokens_ULH[at, : stored_NLH.shape[1]] = stored_NLH.index_select(0, row_U[at])
        return ModalityTokens(tokens_ULH, mask_UL)

    def _open(self, part: int) -> Tensor:
        tokens_NLH = self.store.open(self.parts[part])
        if tokens_NLH.shape[-1] != self.hidden_size:
            raise UserError(
                f"{self.store.directory}: {self.parts[part]} has tokens of {tokens_NLH.shape[-1]} "
                f"columns, not of {self.hidden_size}; delete the store and run the content stage "
                "again"
            )
        return tokens_NLH


def _identity(directory: Path) -> int:
    """Parts of a store never change, so what points to them says which tokens these are."""
    digest = hashlib.blake2b(digest_size=8)
    for name in (_DESCRIPTION, _INDEX):
        digest.update((directory / name).read_bytes())
    return int.from_bytes(digest.digest(), "little", signed=True)

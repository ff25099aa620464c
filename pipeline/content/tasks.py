"""What workers do for the content stage: digests of items, and tokens of new ones.

Both stream over row groups of items.parquet, so memory is bounded by a batch of them and, for
tokens, by one part of the store.

Shapes: N items, L token positions, H width of a tower.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, to_raw_ids
from multimodal.content_config import TextTower
from multimodal.images import image_path
from multimodal.token_range import TokenRangeError
from multimodal.token_store import PartTokens, TokenStore
from multimodal.tower_files import Tower
from pipeline.catalogue_use import changed_while
from pipeline.samples.contract import open_parquet

if TYPE_CHECKING:
    from multimodal.item_tokens import EncodedItems

DIGEST_ROWS = 1024
"""Rows read at a time: images of so many items are in memory."""

AS_WRITTEN = "item_id as written"
"""Column of ids as the catalogue has them, for messages: raw ids of strings are hashes."""

_NO_VALUE = 0
"""Digest of null."""


@dataclass(frozen=True)
class Catalogue:
    """Where values of items are read."""

    root: Path
    """The data root."""
    columns: dict[str, str]
    """By modality."""
    name: str = "items.parquet"
    """Of the file in the data root."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.root / self.name

    def batches(self, row_group: int, columns: list[str], num_rows: int) -> Iterator[pa.Table]:
        """A row group in pieces, with `item_id` as raw ids and `AS_WRITTEN`.

        Raises:
            UserError: the file is damaged.
        """
        with open_parquet(self.path) as file:
            yield from self.pieces(file, row_group, columns, num_rows)

    def pieces(
        self, file: pq.ParquetFile, row_group: int, columns: list[str], num_rows: int
    ) -> Iterator[pa.Table]:
        """As `batches`, of the file that is open: another one may have its name by now.

        Raises:
            UserError: the file is damaged.
        """
        try:
            for piece in file.iter_batches(num_rows, [row_group], ["item_id", *columns]):
                table = pa.Table.from_batches([piece])
                table = table.append_column(AS_WRITTEN, table["item_id"])
                yield table.set_column(0, "item_id", to_raw_ids(table["item_id"]))
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} is damaged ({str(error).splitlines()[0]}); write it again"
            ) from error

    def digests(self, table: pa.Table) -> dict[str, Int64Array]:
        """Identity of the content of some rows, without its decoding, by modality."""
        return {name: self.digests_of(table, name) for name in self.columns}

    def digests_of(self, table: pa.Table, modality: str) -> Int64Array:
        """Identity of the content of some rows in one modality."""
        column = table[self.columns[modality]]
        return _digests(column, is_text=modality == "text", root=self.root)

    def changed(self) -> UserError:
        """That another state of it, or of a file that it names, lies there now."""
        return changed_while(f"{self.name} or a file that it names", self.root, "content")


# --- digests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digests:
    """Identity of the content of a row group's items, without its decoding."""

    row_group: int
    item_ids_N: Int64Array
    digests_N: dict[str, Int64Array]
    """By modality."""


def digest_row_group(row_group: int, catalogue: Catalogue) -> Digests:
    """Hash the text and image of all items of a row group."""
    ids: list[Int64Array] = []
    found: dict[str, list[Int64Array]] = {name: [] for name in catalogue.columns}
    columns = list(catalogue.columns.values())
    for table in catalogue.batches(row_group, columns, DIGEST_ROWS):
        ids.append(table["item_id"].to_numpy())
        for name, digests_N in catalogue.digests(table).items():
            found[name].append(digests_N)
    none = np.empty(0, np.int64)
    return Digests(
        row_group,
        np.concatenate([none, *ids]),
        {name: np.concatenate([none, *parts]) for name, parts in found.items()},
    )


def _digests(column: pa.ChunkedArray, *, is_text: bool, root: Path) -> Int64Array:
    values = column.to_pandas().to_numpy(object)
    if is_text:
        texts = pd.Series(values).fillna("").to_numpy(object)
        return pd.util.hash_array(texts, categorize=False).view(np.int64)
    return np.array([_image_digest(value, root) for value in values], np.int64)


def _image_digest(value: bytes | str | None, root: Path) -> int:
    if value is None:
        return _NO_VALUE
    if isinstance(value, str):
        # Not the bytes: a daily run would read all images anew.
        path = image_path(value, root)
        try:
            stat = None if path is None else path.stat()
            seen = "outside" if stat is None else f"{stat.st_size}|{stat.st_mtime_ns}"
        except (OSError, ValueError):  # the latter of a name with a zero byte
            seen = "absent"
        value = f"{value}|{seen}".encode()
    digest = hashlib.blake2b(value, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewRows:
    """New items of one row group."""

    row_group: int
    rows_N: Int64Array
    """Positions in the row group, ascending."""
    item_ids_N: Int64Array
    digests_N: Int64Array


@dataclass(frozen=True)
class EncodeTask:
    """New items of some row groups, for parts that they share."""

    modality: str
    groups: tuple[NewRows, ...]

    @property
    def num_items(self) -> int:
        """Of all row groups."""
        return sum(len(rows.rows_N) for rows in self.groups)


@dataclass(frozen=True)
class EncoderSettings:
    """What a worker needs, whatever its tasks."""

    catalogue: Catalogue
    tower: Tower
    store: Path
    fingerprint: str
    hidden_size: int
    items_per_batch: int
    items_per_part: int
    use_gpu: bool
    """The stage reserved one for the worker."""


class TokenWriter:
    """Writes the lower-layer tokens of new items into the store. Built once per process."""

    def __init__(self, settings: EncoderSettings) -> None:
        # Transformers takes seconds to import, and the driver never encodes.
        from multimodal.item_inputs import build_preparer
        from multimodal.item_tokens import LowerEncoder
        from multimodal.towers import split_tower

        self.settings = settings
        tower = settings.tower
        self.encode = LowerEncoder(
            split_tower(tower),
            build_preparer(tower, settings.catalogue.root),
            tower,
            torch.device("cuda" if settings.use_gpu else "cpu"),
        )
        self.store = TokenStore(settings.store, settings.fingerprint, settings.tower.precision)

    def __call__(self, task: EncodeTask) -> Iterator[int]:
        """Encode and store; yields the number of items of every part.

        Raises:
            UserError: the precision of the stored tokens does not hold an item's, or the items are
                not those of the task any more.
        """
        size = self.settings.items_per_part
        pending: list[_Encoded] = []
        for piece in self._pieces(task):
            pending.append(self._encoded(piece, task.modality))
            if sum(len(encoded.item_ids_N) for encoded in pending) >= size:
                yield self._write(pending)
                pending = []
        if pending:
            yield self._write(pending)

    def _pieces(self, task: EncodeTask) -> Iterator["_Piece"]:
        """The task's items, at most `items_per_batch` at a time."""
        catalogue, size = self.settings.catalogue, self.settings.items_per_batch
        column = catalogue.columns[task.modality]
        with open_parquet(catalogue.path) as file:
            for new in task.groups:
                if new.row_group >= file.num_row_groups or column not in file.schema_arrow.names:
                    raise catalogue.changed()
                yield from self._new_rows(
                    new, catalogue.pieces(file, new.row_group, [column], size)
                )

    def _new_rows(self, new: NewRows, tables: Iterator[pa.Table]) -> Iterator["_Piece"]:
        """The new rows in each of a row group's tables."""
        start = taken = 0
        for table in tables:
            end = taken + int(np.searchsorted(new.rows_N[taken:], start + len(table)))
            if end > taken:
                wanted = table.take(pa.array(new.rows_N[taken:end] - start))
                yield _Piece(wanted, new.item_ids_N[taken:end], new.digests_N[taken:end])
            start, taken = start + len(table), end
            if taken == len(new.rows_N):
                return
        raise self.settings.catalogue.changed()

    def _encoded(self, piece: "_Piece", modality: str) -> "_Encoded":
        self._require_planned(piece, modality)
        values = piece.table[self.settings.catalogue.columns[modality]].to_pylist()
        try:
            encoded = self.encode(values)
        except TokenRangeError as error:
            raise error.of_item(piece.table[AS_WRITTEN][error.row].as_py()) from error
        # Again: a file that the catalogue names may have been replaced while it was decoded.
        self._require_planned(piece, modality)
        return _Encoded(piece.item_ids_N, piece.digests_N, encoded)

    def _require_planned(self, piece: "_Piece", modality: str) -> None:
        """Refuse rows that are not what was digested: the store would keep them for good."""
        catalogue = self.settings.catalogue
        ids_N, digests_N = piece.table["item_id"], catalogue.digests_of(piece.table, modality)
        is_same = np.array_equal(ids_N.to_numpy(), piece.item_ids_N)
        if not is_same or not np.array_equal(digests_N, piece.digests_N):
            raise catalogue.changed()

    def _write(self, pieces: list["_Encoded"]) -> int:
        longest = max(piece.items.tokens_MLH.shape[1] for piece in pieces)
        padded = [_padded(piece.items.tokens_MLH, longest) for piece in pieces]
        part = PartTokens(
            np.concatenate([piece.item_ids_N for piece in pieces]),
            np.concatenate([piece.digests_N for piece in pieces]),
            [fault for piece in pieces for fault in piece.items.faults],
            torch.cat(padded),
            torch.cat([piece.items.lengths_M for piece in pieces]),
            [is_cut for piece in pieces for is_cut in piece.items.is_cut],
        )
        self.store.append(part)
        return len(part.item_ids_N)


@dataclass(frozen=True)
class _Piece:
    table: pa.Table
    """As the file has it now."""
    item_ids_N: Int64Array
    """Of the task, like the digests."""
    digests_N: Int64Array


@dataclass(frozen=True)
class _Encoded:
    item_ids_N: Int64Array
    digests_N: Int64Array
    items: "EncodedItems"


def _padded(tokens_MLH: Tensor, longest: int) -> Tensor:
    return torch.nn.functional.pad(tokens_MLH, (0, 0, 0, longest - tokens_MLH.shape[1]))


# --- checks --------------------------------------------------------------------------------------


def check_columns(catalogue: Catalogue, towers: dict[str, Tower]) -> list[int]:
    """Rows of every row group of items.parquet, whose columns the towers can read.

    Raises:
        UserError: a column is not there or has a wrong type.
    """
    with open_parquet(catalogue.path) as file:
        schema: pa.Schema = file.schema_arrow
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    for name, tower in towers.items():
        if tower.column not in schema.names:
            raise UserError(
                f"content.{name}.column: {catalogue.path} has no column {tower.column!r}; it has "
                f"{schema.names}: name one of them, or set content.{name}=null"
            )
        fault = type_fault(schema.field(tower.column).type, tower)
        if fault is not None:
            raise UserError(
                f"content.{name}.column: {tower.column!r} of {catalogue.path} {fault}; cast it "
                "where the file is written"
            )
    return rows


def type_fault(kind: pa.DataType, tower: Tower) -> str | None:
    """Why a tower cannot read a column of this type; None if it can."""
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    if is_text or (is_bytes and not isinstance(tower, TextTower)):
        return None
    wanted = "a string" if isinstance(tower, TextTower) else "bytes or a path (string)"
    return f"has type {kind} but must be {wanted}"

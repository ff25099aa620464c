"""Semantic codes as columns of samples: of the candidate, of its user's history, and across both.

Pure functions of ids and the codes artifact (item_id, sid_0, sid_1, ..., optional sid_suffix, vq
and vq_nearest). Join calls, per row group:

    codes = ItemCodes.load(path)                     once, in `FeatureSources.load`
    candidate_columns(codes, item_ids)               sparse:<sid_l>, sparse:<vq> of the candidate
    history_columns(codes, history lists)            sequence:<sid_l>, sequence:<vq_nearest>,
                                                     aligned with the history
    cross_columns(codes, item_ids, history lists)    sparse:<shared_l>, dense:<shared_l_count>
    user_code_ids(codes, item_ids, user_ids, depth)  sparse id of (user, code prefix), hashed

Codes are raw ids of identity tables: row = code + 1, and `MISSING_ID` (an item without codes) goes
to the OOV row.
"""

# Shapes: N items (one more row stands for unknown ones), B samples, L levels.

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.config import MISSING_ID
from embedding.errors import UserError
from embedding.raw_ids import Int64Array, mix64, to_raw_ids
from embedding.samples import CODEBOOKS
from multimodal.codes.tree import code_groups
from multimodal.codes.vectors import Float32Array, Int32Array
from pipeline.samples.contract import open_parquet
from pipeline.samples.lookup import EntityColumns, IdLists, by_id, id_column, with_missing

CODES_FILE = "codes.parquet"
"""Of a codes artifact."""
VECTOR = "vector"
"""Its column with the elements of item vectors that are features."""
NEAREST = "vq_nearest"
"""Its column with one VQ code an item: its own slot, or the first of its code."""
MAX_DEPTH = 2
"""Longest code prefix of the cross features: the first code, and the first two."""
_MASK_63 = np.uint64(0x7FFF_FFFF_FFFF_FFFF)


@dataclass(frozen=True)
class ItemCodes:
    """Codes by item; the last row stands for items without codes."""

    entities: EntityColumns
    """`sid_0`, `sid_1`, ..., `sid_suffix`, `vq` and `vq_nearest` by row."""
    prefixes: tuple[Int64Array, ...]
    """Number of the first code, and the first two, by row: equal for equal prefixes; -1 unknown."""
    vectors_ND: Float32Array | None = None
    """Elements that enter as dense features; NaN in the last row."""
    codebooks: str = ""
    """Whose codes these are."""

    @classmethod
    def of(cls, table: pa.Table) -> "ItemCodes":
        """From the columns of a codes artifact, rows in any order.

        Raises:
            UserError: an item occurs twice, or a column of codes is missing.
        """
        if "item_id" not in table.column_names or not {"sid_0", "vq"} & {*table.column_names}:
            raise UserError(
                f"a codes artifact needs the columns item_id and sid_0 or vq, and has "
                f"{table.column_names}; run the quantize stage again"
            )
        ids, table = by_id(to_raw_ids(table["item_id"]).to_numpy(), table)
        if len(ids) > 1 and (ids[1:] == ids[:-1]).any():
            twice = ids[1:][ids[1:] == ids[:-1]][0]
            raise UserError(f"item {twice} has two rows of codes; give every item one")
        names = [name for name in table.column_names if name.startswith("sid_")]
        of_vq = [NEAREST] if NEAREST in table.column_names else []
        columns = {name: with_missing(id_column(table[name])) for name in (*names, *of_vq)}
        if "vq" in table.column_names:
            columns["vq"] = _slot_lists(table["vq"])
        entities = EntityColumns(ids, columns, {})
        levels = [level for level in range(len(names)) if f"sid_{level}" in names]
        codes = [table[f"sid_{level}"].to_numpy() for level in levels]
        prefixes = tuple(
            np.append(code_groups(np.stack(codes[: depth + 1], axis=1))[0], -1)
            for depth in range(min(len(levels), MAX_DEPTH))
        )
        vectors_ND = None
        if VECTOR in table.column_names:
            lists = table[VECTOR].combine_chunks()
            known = lists.flatten().to_numpy().reshape(len(ids), lists.type.list_size)
            vectors_ND = np.pad(known, ((0, 1), (0, 0)), constant_values=np.nan)
        codebooks = (table.schema.metadata or {}).get(CODEBOOKS, b"").decode()
        return cls(entities, prefixes, vectors_ND, codebooks)

    @classmethod
    def load(cls, path: Path) -> "ItemCodes":
        """Read a codes artifact's Parquet file.

        Raises:
            UserError: the file is damaged or holds no codes.
        """
        with open_parquet(path) as file:
            return cls.of(file.read(use_threads=False))

    @property
    def levels(self) -> dict[str, Int64Array]:
        """Columns with one code an item."""
        columns = self.entities.ids.items()
        return {name: column for name, column in columns if not isinstance(column, IdLists)}

    @property
    def neighbours(self) -> IdLists | None:
        """The VQ codes."""
        column = self.entities.ids.get("vq")
        return column if isinstance(column, IdLists) else None


def _slot_lists(column: pa.ChunkedArray) -> IdLists:
    """VQ codes, most of what a codes artifact holds, as narrow as it stores them; see `ItemCodes`.

    They are no raw ids that would have to be made: slots are not negative, and no list is null.
    """
    lists = column.combine_chunks()
    offsets = np.zeros(len(lists) + 2, np.int64)
    np.cumsum(lists.value_lengths().to_numpy(), out=offsets[1:-1])
    offsets[-1] = offsets[-2] + 1
    slots = lists.flatten().to_numpy()
    return IdLists(offsets, np.append(slots, slots.dtype.type(MISSING_ID)))


def read_codes(directory: Path, *more: str) -> pa.Table:
    """Of a quantize artifact the ids and the codes of one an item; `more`: columns, if there."""
    path = directory / CODES_FILE
    names = pq.read_schema(path).names
    wanted = [n for n in names if n == "item_id" or n.startswith("sid_") or n in more]
    return pq.read_table(path, columns=wanted)


@dataclass(frozen=True)
class NearItems:
    """VQ codes of all items."""

    own_N: Int64Array
    """Slot of each item; -1 for items that are not in the codebook."""
    others_Nk: Int32Array
    """The nearest other items, the nearest first; -1 behind the last one."""

    @property
    def nearest(self) -> Int64Array:
        """One slot that stands for the item: its own, or the most similar one."""
        return np.where(self.own_N >= 0, self.own_N, self.others_Nk[:, 0])


def codes_table(
    item_ids_N: Int64Array,
    codes_NL: Int32Array,
    suffix_N: Int32Array | None = None,
    near: NearItems | None = None,
    vectors_ND: Float32Array | None = None,
) -> pa.Table:
    """What a codes artifact holds: one row an item; unused neighbours (-1) are left out."""
    data: dict[str, pa.Array] = {"item_id": pa.array(item_ids_N)}
    data |= {f"sid_{i}": pa.array(code_N) for i, code_N in enumerate(codes_NL.T)}
    if suffix_N is not None:
        data["sid_suffix"] = pa.array(suffix_N)
    if near is not None:
        used = near.others_Nk >= 0
        offsets = np.concatenate([[0], np.cumsum(used.sum(axis=1))])  # beyond 2^31 for many items
        slots = pa.array(near.others_Nk[used])
        data["vq"] = pa.LargeListArray.from_arrays(pa.array(offsets), slots)
        data[NEAREST] = pa.array(near.nearest)
    if vectors_ND is not None:
        flat = pa.array(np.ascontiguousarray(vectors_ND).ravel())
        data[VECTOR] = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
    return pa.table(data)


def candidate_columns(codes: ItemCodes, item_ids_B: Int64Array) -> dict[str, pa.Array]:
    """Codes of the candidate: one id a level, and the list of its nearest items as `vq`."""
    rows = codes.entities.positions(item_ids_B)
    found = {name: pa.array(column[rows]) for name, column in codes.levels.items()}
    if codes.neighbours is not None:
        found["vq"] = codes.neighbours.take(rows, None)
    if codes.vectors_ND is not None:
        own_BD = codes.vectors_ND[rows]
        found |= {f"{VECTOR}_{i}": pa.array(column) for i, column in enumerate(own_BD.T)}
    return found


def history_columns(codes: ItemCodes, history: pa.ListArray) -> dict[str, pa.ListArray]:
    """Codes of the history's items: sequences as long as the history, in its order.

    Args:
        codes: the artifact.
        history: item ids, one list a sample, offsets from 0.
    """
    rows = codes.entities.positions(history.values.to_numpy())
    return {
        name: pa.ListArray.from_arrays(history.offsets, pa.array(column[rows]))
        for name, column in codes.levels.items()
    }


def cross_columns(
    codes: ItemCodes, item_ids_B: Int64Array, history: pa.ListArray
) -> dict[str, pa.Array]:
    """The part of the history that resembles the candidate.

    Columns `shared_1`, `shared_2`: item ids of the history whose first code, first two codes are
    those of the candidate, oldest first; `shared_1_count`, `shared_2_count`: how many, float32.
    Items without codes share nothing.
    """
    offsets = history.offsets.to_numpy().astype(np.int64)
    past_ids = history.values.to_numpy()
    past_rows = codes.entities.positions(past_ids)
    own_rows = np.repeat(codes.entities.positions(item_ids_B), np.diff(offsets))
    found: dict[str, pa.Array] = {}
    for depth, prefix in enumerate(codes.prefixes, start=1):
        shared = (prefix[past_rows] == prefix[own_rows]) & (past_rows >= 0)
        before = np.concatenate([[0], np.cumsum(shared)])[offsets]
        found[f"shared_{depth}"] = pa.ListArray.from_arrays(
            pa.array(before.astype(np.int32)), pa.array(past_ids[shared])
        )
        found[f"shared_{depth}_count"] = pa.array(np.diff(before).astype(np.float32))
    return found


def user_code_ids(
    codes: ItemCodes, item_ids_B: Int64Array, user_ids_B: Int64Array, depth: int
) -> pa.Array:
    """An id of (user, first `depth` codes of the candidate), for a hashed table.

    Its row learns how much this user likes this kind of items. `MISSING_ID` without codes.
    """
    rows = codes.entities.positions(item_ids_B)
    key = mix64(np.asarray(user_ids_B, np.int64))
    for level in range(depth):
        key = mix64((key ^ codes.levels[f"sid_{level}"][rows].view(np.uint64)).view(np.int64))
    ids = (key & _MASK_63).view(np.int64)
    return pa.array(np.where(rows >= 0, ids, MISSING_ID))

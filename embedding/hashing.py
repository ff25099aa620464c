"""Raw ids to rows of a table, vectorised and independent of batch, rank and process."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from embedding.config import OOV_ROW, Hashed, Identity, ManagedCollision, TableConfig

# Shapes: F features, R samples, N ids.

MANAGED_ID_BITS = 62
MANAGED_ID_RANGE = 1 << MANAGED_ID_BITS
"""Managed-collision modules see ids in [0, MANAGED_ID_RANGE)."""
MANAGED_MISSING_ID = MANAGED_ID_RANGE - 1
"""The id that all missing values share in a managed-collision table."""
NO_ID = torch.iinfo(torch.int64).max
"""What TorchRec keeps in a row of a managed-collision table that no id owns."""

_CHUNK = 1 << 15  # ids mixed at a time: they stay in the cache, and below torch's OpenMP threshold


def rows_of(raw_ids: Tensor, table: TableConfig) -> Tensor:
    """Row of every raw id; for managed-collision tables, the mixed id their module remaps.

    Args:
        raw_ids: int64 of any shape, >= 0, or `MISSING_ID`.
        table: gives the id scheme, the number of rows and, by its name, the hash salt.

    Returns:
        int64 of the same shape: `OOV_ROW` for missing ids; ids below zero count as missing.
    """
    rows = torch.empty_like(raw_ids, memory_format=torch.contiguous_format)
    flat, out = raw_ids.reshape(-1), rows.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        _rows_of_chunk(flat[start : start + _CHUNK], table, out[start : start + _CHUNK])
    return rows


def rows_of_features(raw_FR: Tensor, tables: Sequence[TableConfig]) -> Tensor:
    """Rows of stacked single-valued features: int64 (F, R); `tables[f]` is the table of row f."""
    rows_FR = torch.empty_like(raw_FR, memory_format=torch.contiguous_format)
    for raw_R, table, out_R in zip(raw_FR, tables, rows_FR, strict=True):
        for start in range(0, raw_R.numel(), _CHUNK):
            _rows_of_chunk(raw_R[start : start + _CHUNK], table, out_R[start : start + _CHUNK])
    return rows_FR


def out_of_range(raw_ids: Tensor, table: TableConfig) -> Tensor:
    """True for ids that an `Identity` table sends to the OOV row: it has no row for them."""
    if not isinstance(table.ids, Identity):
        return torch.zeros_like(raw_ids, dtype=torch.bool)
    return raw_ids >= table.num_embeddings - 1


def collision_rate(unique_raw_ids: Tensor, table: TableConfig) -> float:
    """Share of distinct known ids that share their row with another one; 0 for no ids.

    Managed-collision tables do not collide; what they lack room for is counted where it happens.
    """
    known = unique_raw_ids[unique_raw_ids >= 0]
    if known.numel() == 0 or isinstance(table.ids, ManagedCollision):
        return 0.0
    _, counts = rows_of(known, table).unique(return_counts=True)
    return float(counts[counts > 1].sum()) / known.numel()


def expected_collision_rate(num_ids: int, table: TableConfig) -> float:
    """What `collision_rate` comes to for so many distinct ids, by the uniformity of the hash."""
    if num_ids <= 1 or not isinstance(table.ids, Hashed):
        return 0.0
    rows = table.num_embeddings - 1
    return float(1 - (1 - 1 / rows) ** (num_ids - 1))


def mix64(ids: Tensor, salt: int, out: Tensor) -> Tensor:
    """SplitMix64's finaliser of `ids + salt` into `out`: a bijection of 64-bit integers."""
    torch.add(ids, salt, out=out)
    shifted = torch.empty_like(out)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        # `>>` on int64 copies the sign bit; the mask makes it the logical shift of the algorithm.
        torch.bitwise_right_shift(out, shift, out=shifted)
        shifted.bitwise_and_((1 << (64 - shift)) - 1)
        out.bitwise_xor_(shifted)
        if factor is not None:
            out.mul_(factor)
    return out


def name_salt(name: str) -> int:
    """A signed 64-bit salt, the same in every process, that differs between names."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), signed=True)


def _rows_of_chunk(raw_N: Tensor, table: TableConfig, out_N: Tensor) -> None:
    missing_N = raw_N < 0
    match table.ids:
        case Hashed():
            mix64(raw_N, name_salt(table.name), out_N)
            out_N.bitwise_and_(torch.iinfo(torch.int64).max)
            out_N.remainder_(table.num_embeddings - 1).add_(1)
            out_N.masked_fill_(missing_N, OOV_ROW)
        case Identity():
            torch.add(raw_N, 1, out=out_N)
            out_N.masked_fill_(missing_N | (raw_N >= table.num_embeddings - 1), OOV_ROW)
        case ManagedCollision():
            # The mixed id decides the owner rank (its high bits) and names the row: 62 of 64 bits
            # of a bijection, so two ids share one with probability 2**-62.
            mix64(raw_N, name_salt(table.name), out_N)
            out_N.bitwise_and_(MANAGED_ID_RANGE - 1).clamp_(max=MANAGED_MISSING_ID - 1)
            out_N.masked_fill_(missing_N, MANAGED_MISSING_ID)

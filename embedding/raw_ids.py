"""Raw ids: any categorical Arrow column as int64, the same on every machine and in every process.

Integers from 0 on stay what they are; strings become 63-bit hashes, so that no dictionary has to be
built, shipped or kept. 63 bits keep the chance of one collision among 100 million strings below
0.1%. Negative integers, and unsigned ones from 2**63 on, lose their top bit: below zero lies only
`MISSING_ID`. A null is missing, -1 in the data is an id like any other.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from embedding.config import MISSING_ID

_MASK_63 = np.uint64(0x7FFF_FFFF_FFFF_FFFF)
_MAX_OFFSET = np.iinfo(np.int32).max
"""Ids in all lists of a list array whose offsets have 32 bits."""

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""The step of SplitMix64."""

Int64Array = np.ndarray[Any, np.dtype[np.int64]]
UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]


def hash_strings(array: pa.Array) -> Int64Array:
    """63-bit hashes of a string (or dictionary of strings) array; `MISSING_ID` for null.

    The distinct strings are hashed once, whatever the number of rows.
    """
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.large_string()).to_numpy(zero_copy_only=False)
    hashes = np.full(len(distinct) + 1, MISSING_ID, np.int64)
    hashes[:-1] = (pd.util.hash_array(distinct.astype(object)) & _MASK_63).view(np.int64)
    # The last entry stands for null.
    indices = encoded.indices.cast(pa.int64()).fill_null(len(distinct))
    return hashes[indices.to_numpy(zero_copy_only=False)]


def is_id_type(kind: pa.DataType) -> bool:
    """True for a type whose values can be raw ids: integers, booleans and strings."""
    if pa.types.is_dictionary(kind):
        return is_id_type(kind.value_type)
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
    )


def is_id_list_type(kind: pa.DataType) -> bool:
    """True for a list whose values can be raw ids."""
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return is_list and is_id_type(kind.value_type)


def to_raw_ids(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A categorical column as int64 >= 0, a list of them as list<int64>; nulls stay null.

    Lists of more than 2^31 ids in all are large_list<int64>.

    Raises:
        TypeError: the column is neither.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # more than 2 GiB of strings do not fit in one array
        return pa.concat_arrays([to_raw_ids(chunk) for chunk in array.chunks])
    if is_id_list_type(array.type):
        return _lists_to_raw_ids(array)
    if not is_id_type(array.type):
        raise TypeError(f"{array.type} is not a categorical type")
    if pa.types.is_dictionary(array.type) and not _is_string(array.type.value_type):
        array = array.cast(array.type.value_type)
    if _is_string(array.type) or pa.types.is_dictionary(array.type):
        return pa.array(hash_strings(array), mask=_null_mask(array))
    # Bit for bit: a 64-bit hash has one raw id, whether it was stored signed or unsigned.
    signed = array.view(pa.int64()) if pa.types.is_uint64(array.type) else array.cast(pa.int64())
    return pc.bit_wise_and(signed, pa.scalar(int(_MASK_63), pa.int64()))


def ids_or_missing(column: pa.Array) -> Int64Array:
    """An int64 array as numpy, `MISSING_ID` where it is null."""
    return np.asarray(column.fill_null(MISSING_ID).to_numpy(zero_copy_only=False), np.int64)


def id_lists(ids: pa.Array) -> pa.ListArray:
    """Single ids as lists of one; null stays null."""
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, ids, mask=ids.is_null() if ids.null_count else None)


def mix64(ids: Int64Array) -> UInt64Array:
    """SplitMix64's first draw from every id: spreads them over all 64 bits, one to one.

    What is stored depends on it (buckets, held-out items, samples): it must not change.
    """
    with np.errstate(over="ignore"):
        return finalised64(ids.view(np.uint64) + np.uint64(GOLDEN_GAMMA))


def finalised64(x: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser, without its step: a bijection of 64-bit integers."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _lists_to_raw_ids(array: pa.Array) -> pa.Array:
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = to_raw_ids(array.flatten())
    lists = pa.LargeListArray.from_arrays(
        pa.array(offsets), values, mask=array.is_null() if array.null_count else None
    )
    return lists.cast(pa.list_(pa.int64())) if len(values) <= _MAX_OFFSET else lists


def _null_mask(array: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(array.is_null().to_numpy(zero_copy_only=False))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

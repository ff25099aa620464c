"""Raw ids: equal strings have equal ids wherever and however they are stored."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.config import MISSING_ID
from embedding.raw_ids import hash_strings, mix64, to_raw_ids


@given(st.lists(st.none() | st.text(max_size=8), max_size=20))
def test_hash_of_a_string_does_not_depend_on_its_neighbours(strings: list[str | None]) -> None:
    ids = hash_strings(pa.array(strings, pa.string()))

    for string, found in zip(strings, ids.tolist(), strict=True):
        alone = MISSING_ID
        if string is not None:
            hashed = int(pd.util.hash_array(np.array([string], object))[0])
            alone = hashed % 2**63
        assert found == alone


def test_storage_of_strings_does_not_change_their_ids() -> None:
    plain = pa.array(["b", None, "a", "b"])
    expected = to_raw_ids(plain).to_pylist()

    assert expected[1] is None
    assert expected[0] == expected[3] != expected[2]
    assert to_raw_ids(plain.cast(pa.large_string())).to_pylist() == expected
    assert to_raw_ids(plain.dictionary_encode()).to_pylist() == expected
    assert to_raw_ids(pa.chunked_array([plain[:1], plain[1:]])).to_pylist() == expected
    assert to_raw_ids(plain[2:]).to_pylist() == expected[2:]


def test_integers_and_booleans_stay_what_they_are() -> None:
    assert to_raw_ids(pa.array([3, None, 7], pa.int16())).to_pylist() == [3, None, 7]
    assert to_raw_ids(pa.array([True, False])).to_pylist() == [1, 0]
    assert to_raw_ids(pa.array([5, 2**63 + 9], pa.uint64())).to_pylist() == [5, 9]
    assert to_raw_ids(pa.array([4, 4]).dictionary_encode()).to_pylist() == [4, 4]


def test_lists_keep_nulls_and_empty_lists_even_when_sliced() -> None:
    strings = pa.array([["x"], None, [], ["y", None, "x"]])
    x, y = hash_strings(pa.array(["x", "y"])).tolist()

    assert to_raw_ids(strings).to_pylist() == [[x], None, [], [y, None, x]]
    assert to_raw_ids(strings[1:]).to_pylist() == [None, [], [y, None, x]]
    assert to_raw_ids(pa.array([[1, 2], [3]], pa.large_list(pa.int8()))).to_pylist() == [
        [1, 2],
        [3],
    ]


@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))))
def test_no_integer_is_mistaken_for_a_missing_id(values: list[int | None]) -> None:
    expected = [None if value is None else value % 2**63 for value in values]

    assert to_raw_ids(pa.array(values, pa.int64())).to_pylist() == expected
    assert to_raw_ids(pa.array([values], pa.list_(pa.int64()))).to_pylist() == [expected]
    unsigned = [None if value is None else value % 2**64 for value in values]
    assert to_raw_ids(pa.array(unsigned, pa.uint64())).to_pylist() == expected


def test_negative_integers_of_any_width_are_ids_of_their_own() -> None:
    assert to_raw_ids(pa.array([-7, None, -1], pa.int16())).to_pylist() == [
        2**63 - 7,
        None,
        2**63 - 1,
    ]
    assert to_raw_ids(pa.array([-7, -7], pa.int8()).dictionary_encode()).to_pylist() == [
        2**63 - 7,
        2**63 - 7,
    ]


def test_floats_are_no_ids() -> None:
    with pytest.raises(TypeError, match="double is not a categorical type"):
        to_raw_ids(pa.array([1.5]))


def test_mix64_is_one_to_one_and_spreads_consecutive_ids_evenly() -> None:
    mixed = mix64(np.arange(-50_000, 50_000))

    assert len(np.unique(mixed)) == 100_000
    counts = np.bincount((mixed % np.uint64(8)).astype(np.int64))
    # Binomial with mean 12,500: five standard deviations are 523.
    assert abs(counts - 12_500).max() < 523

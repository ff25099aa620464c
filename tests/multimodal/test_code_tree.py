"""Code look-up and suffixes against dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding.errors import UserError
from multimodal.codes.tree import CodedItems, CodeTree, code_groups, tell_apart

CODES = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=40)


def as_codes(rows: list[tuple[int, ...]]) -> np.ndarray:
    return np.array(rows, np.int32)


@given(CODES)
def test_prefixes_find_their_items(rows: list[tuple[int, ...]]) -> None:
    tree = CodeTree.of(as_codes(rows))
    prefixes = {row[:n] for row in rows for n in range(4)} | {(9,), (0, 9), (9, 9, 9)}
    for prefix in prefixes:
        inside = [i for i, row in enumerate(rows) if row[: len(prefix)] == prefix]
        assert tree.items(prefix).tolist() == inside
        if len(prefix) < 3:
            assert tree.children(prefix) == Counter(rows[i][len(prefix)] for i in inside)
    assert tree.children(rows[0]) == {}


def test_a_longer_prefix_than_a_code_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(1, 2, 3, 4\) has 4 levels and codes have 3"):
        CodeTree.of(as_codes([(1, 2, 3)])).items((1, 2, 3, 4))


def test_groups_of_codes_beyond_64_bits() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 4096, (50, 7)).astype(np.int32)
    codes = distinct[rng.integers(0, 50, 400)]

    group, sizes = code_groups(codes)

    expected = Counter(map(tuple, codes.tolist()))
    assert [int(sizes[g]) for g in group] == [expected[tuple(row)] for row in codes.tolist()]


@given(CODES, CODES, st.integers(1, 6))
def test_suffixes_are_unique_in_a_code_and_stay_with_their_items(
    first: list[tuple[int, ...]], second: list[tuple[int, ...]], num_codes: int
) -> None:
    ids, later_ids = np.arange(len(first)) + 5, np.arange(len(second)) * 2
    before = tell_apart(ids, as_codes(first), num_codes)
    earlier = CodedItems(ids, as_codes(first), before.suffix_N)

    after = tell_apart(later_ids, as_codes(second), num_codes, earlier)

    for rows, found in ((first, before), (second, after)):
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, suffix in zip(rows, found.suffix_N.tolist(), strict=True):
            groups[row].append(suffix)
        shared = 0
        for suffixes in groups.values():
            alone = [s for s in suffixes if s < num_codes - 1]
            assert len(set(alone)) == len(alone)
            assert max(suffixes) < num_codes
            if len(suffixes) > num_codes:
                shared += suffixes.count(num_codes - 1)
        assert found.num_shared == shared
    assert before.suffix_N.tolist() == [
        min(first[:i].count(row), num_codes - 1) for i, row in enumerate(first)
    ]
    for i, item in enumerate(later_ids.tolist()):
        if item in ids and first[item - 5] == second[i]:
            old = before.suffix_N[item - 5]
            assert old == num_codes - 1 or after.suffix_N[i] == old

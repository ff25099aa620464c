"""Raw ids to rows, against a plain-integer implementation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from embedding.config import (
    MISSING_ID,
    OOV_ROW,
    Hashed,
    Identity,
    ManagedCollision,
    TableConfig,
)
from embedding.hashing import (
    MANAGED_ID_RANGE,
    MANAGED_MISSING_ID,
    collision_rate,
    expected_collision_rate,
    name_salt,
    out_of_range,
    rows_of,
)

MASK = (1 << 64) - 1


def table(num_embeddings: int = 1000, name: str = "t", **fields) -> TableConfig:
    return TableConfig(name=name, num_embeddings=num_embeddings, embedding_dim=4, **fields)


def splitmix64(value: int) -> int:
    """The published finaliser on unsigned 64-bit integers."""
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@given(st.lists(st.integers(0, (1 << 63) - 1), max_size=20), st.integers(2, 1 << 40))
def test_hashed_rows_are_splitmix_modulo_the_rows_beside_the_oov_row(
    ids: list[int], num_embeddings: int
) -> None:
    rows = rows_of(torch.tensor(ids, dtype=torch.int64), table(num_embeddings))
    mixed = [splitmix64(i + name_salt("t")) & (MASK >> 1) for i in ids]
    assert rows.tolist() == [1 + m % (num_embeddings - 1) for m in mixed]


@given(st.lists(st.integers(0, (1 << 63) - 1), max_size=20))
def test_managed_ids_are_in_range_and_distinct(ids: list[int]) -> None:
    mixed = rows_of(torch.tensor(ids, dtype=torch.int64), table(ids=ManagedCollision()))
    assert all(0 <= m < MANAGED_MISSING_ID for m in mixed.tolist())
    assert len(set(mixed.tolist())) == len(set(ids))


def test_missing_ids_share_a_reserved_row() -> None:
    ids = torch.tensor([MISSING_ID, 5, MISSING_ID])
    assert rows_of(ids, table(ids=Hashed()))[[0, 2]].tolist() == [OOV_ROW, OOV_ROW]
    assert rows_of(ids, table(ids=Identity())).tolist() == [OOV_ROW, 6, OOV_ROW]
    managed = rows_of(ids, table(ids=ManagedCollision()))
    assert managed[[0, 2]].tolist() == [MANAGED_ID_RANGE - 1] * 2


def test_identity_sends_ids_without_a_row_to_the_oov_row_and_counts_them() -> None:
    ids = torch.tensor([0, 8, 9, 10, MISSING_ID])
    config = table(10, ids=Identity())
    assert rows_of(ids, config).tolist() == [1, 9, OOV_ROW, OOV_ROW, OOV_ROW]
    assert out_of_range(ids, config).tolist() == [False, False, True, True, False]
    assert not out_of_range(ids, table(10)).any(), "a hashed table has a row for every id"


def test_rows_do_not_depend_on_shape_or_chunk() -> None:
    ids = torch.randint(0, 1 << 62, (70_000,))
    for config in (table(100, "a"), table(10_000, "b"), table(50, "c", ids=Identity())):
        rows = rows_of(ids, config)
        assert torch.equal(rows_of(ids.view(7, 10_000), config).view(-1), rows)
        single = torch.stack([rows_of(i.view(1), config)[0] for i in ids[-5:]])
        assert torch.equal(single, rows[-5:])


def test_tables_are_salted_by_name() -> None:
    ids = torch.arange(1000)
    assert not torch.equal(rows_of(ids, table(name="a")), rows_of(ids, table(name="b")))


def test_rows_are_spread_evenly() -> None:
    counts = rows_of(torch.arange(100_000), table(101)).bincount(minlength=101)
    assert counts[OOV_ROW] == 0
    # 1000 expected per row; five standard deviations of a binomial
    assert (counts[1:] - 1000).abs().max() < 5 * 1000**0.5


def test_collision_rate_is_the_share_of_ids_that_share_a_row() -> None:
    ids = torch.arange(500)
    rows = rows_of(ids, table(300)).tolist()
    expected = sum(rows.count(row) > 1 for row in rows) / 500
    assert collision_rate(ids, table(300)) == expected
    assert collision_rate(torch.tensor([MISSING_ID]), table(300)) == 0


def test_expected_collision_rate_is_what_many_ids_come_to() -> None:
    rows = table(30_001)
    ids = torch.arange(20_000)
    assert abs(collision_rate(ids, rows) - expected_collision_rate(20_000, rows)) < 0.01
    assert expected_collision_rate(1, table(2)) == 0
    assert expected_collision_rate(2, table(2)) == 1
    assert expected_collision_rate(20_000, table(300, ids=Identity())) == 0

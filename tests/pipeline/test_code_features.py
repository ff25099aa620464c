"""Code columns of samples against loops over samples and their histories."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding import raw_ids
from embedding.config import MISSING_ID
from embedding.errors import UserError
from pipeline.codes.features import (
    ItemCodes,
    NearItems,
    candidate_columns,
    codes_table,
    cross_columns,
    history_columns,
    user_code_ids,
)
from pipeline.codes.kept_codes import KeptCodes
from pipeline.samples.lookup import IdLists, id_column

NUM_ITEMS, NUM_SAMPLES = 30, 60


class Case:
    """Random codes, candidates and histories; items 1030 .. 1039 have no codes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        ids = rng.permutation(np.arange(1000, 1000 + NUM_ITEMS))
        codes = rng.integers(0, 3, (NUM_ITEMS, 3)).astype(np.int32)
        near = rng.integers(-1, NUM_ITEMS, (NUM_ITEMS, 4)).astype(np.int32)
        self.code = dict(zip(ids.tolist(), codes.tolist(), strict=True))
        self.near = {
            item: [n for n in row if n >= 0]
            for item, row in zip(ids.tolist(), near.tolist(), strict=True)
        }
        suffix = np.arange(NUM_ITEMS, dtype=np.int32)
        self.suffix = dict(zip(ids.tolist(), suffix.tolist(), strict=True))
        own = np.where(np.arange(NUM_ITEMS) % 4 > 0, np.arange(100, 100 + NUM_ITEMS), -1)
        self.nearest = {
            item: slot if slot >= 0 else others[0]
            for item, slot, others in zip(ids.tolist(), own.tolist(), near.tolist(), strict=True)
        }
        self.table = codes_table(ids, codes, suffix, NearItems(own, near))
        self.codes = ItemCodes.of(self.table)
        self.candidates = rng.integers(1000, 1040, NUM_SAMPLES)
        lengths = rng.integers(0, 8, NUM_SAMPLES)
        self.histories = [rng.integers(1000, 1040, n).tolist() for n in lengths]
        self.history = pa.array(self.histories, pa.list_(pa.int64()))


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_candidate_gets_its_codes_and_neighbours(case: Case) -> None:
    columns = candidate_columns(case.codes, case.candidates)

    items = case.candidates.tolist()
    for level in range(3):
        expected = [case.code[i][level] if i in case.code else MISSING_ID for i in items]
        assert columns[f"sid_{level}"].to_pylist() == expected
    assert columns["sid_suffix"].to_pylist() == [case.suffix.get(i, MISSING_ID) for i in items]
    assert columns["vq"].to_pylist() == [case.near.get(i, [MISSING_ID]) for i in items]


def test_elements_of_vectors_are_dense_columns(case: Case) -> None:
    vectors = np.random.default_rng(1).standard_normal((NUM_ITEMS, 2)).astype(np.float32)
    ids, none = np.arange(1000, 1000 + NUM_ITEMS), np.empty((NUM_ITEMS, 0), np.int32)
    near = NearItems(np.arange(NUM_ITEMS), np.zeros((NUM_ITEMS, 1), np.int32))
    codes = ItemCodes.of(codes_table(ids, none, None, near, vectors).take(np.arange(29, -1, -1)))
    columns = candidate_columns(codes, case.candidates)
    for row, item in enumerate(case.candidates.tolist()):
        found = np.array([columns[f"vector_{i}"][row].as_py() for i in (0, 1)], np.float32)
        expected = vectors[item - 1000] if item < 1030 else np.full(2, np.nan, np.float32)
        np.testing.assert_array_equal(found, expected)
    near = NearItems(near.own_N[:0], near.others_Nk[:0])
    nothing = ItemCodes.of(codes_table(ids[:0], none[:0], None, near, vectors[:0]))
    assert np.isnan(nothing.vectors_ND).tolist() == [[True, True]]


def test_history_gets_code_sequences(case: Case) -> None:
    columns = history_columns(case.codes, case.history)

    for level in range(3):
        assert columns[f"sid_{level}"].to_pylist() == [
            [case.code[i][level] if i in case.code else MISSING_ID for i in past]
            for past in case.histories
        ]
    assert columns["vq_nearest"].to_pylist() == [
        [case.nearest.get(i, MISSING_ID) for i in past] for past in case.histories
    ]


def test_crosses_are_the_history_items_with_the_candidates_first_codes(case: Case) -> None:
    columns = cross_columns(case.codes, case.candidates, case.history)

    for depth in (1, 2):
        expected = [
            [
                i
                for i in past
                if i in case.code and case.code.get(own, [])[:depth] == case.code[i][:depth]
            ]
            for own, past in zip(case.candidates.tolist(), case.histories, strict=True)
        ]
        assert sum(map(len, expected)) > 5
        assert columns[f"shared_{depth}"].to_pylist() == expected
        assert columns[f"shared_{depth}_count"].to_pylist() == [len(items) for items in expected]
        assert columns[f"shared_{depth}_count"].type == pa.float32()
    assert set(columns) == {"shared_1", "shared_1_count", "shared_2", "shared_2_count"}
    assert len(case.codes.prefixes) == 2, "longer ones, which nobody reads, are not grouped"


def test_user_code_ids_are_equal_for_equal_users_and_prefixes_only(case: Case) -> None:
    users = np.arange(NUM_SAMPLES) % 3

    ids = user_code_ids(case.codes, case.candidates, users, depth=2).to_pylist()

    named = {}
    for item, user, found in zip(case.candidates.tolist(), users.tolist(), ids, strict=True):
        if item not in case.code:
            assert found == MISSING_ID
        else:
            assert found >= 0
            named.setdefault((user, *case.code[item][:2]), set()).add(found)
    assert all(len(found) == 1 for found in named.values())
    assert len(set.union(*named.values())) == len(named)


def test_codes_are_read_from_their_artifact(tmp_path: Path, case: Case) -> None:
    pq.write_table(case.table, tmp_path / "codes.parquet")
    loaded = candidate_columns(ItemCodes.load(tmp_path / "codes.parquet"), case.candidates)
    assert loaded == candidate_columns(case.codes, case.candidates)


def test_vq_codes_are_held_as_they_are_stored_and_written_as_ids(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that ascend in several chunks, as they are read, are not put in order either."""
    held = case.codes.neighbours
    assert held is not None
    assert held.values.dtype == np.int32
    columns = candidate_columns(case.codes, case.candidates)
    assert columns["vq"].type == pa.list_(pa.int64())
    ordered = case.table.sort_by("item_id")
    chunked = pa.concat_tables([ordered.slice(0, 11), ordered.slice(11)])
    assert chunked["vq"].num_chunks == 2
    monkeypatch.setattr(np, "argsort", None)
    found = candidate_columns(ItemCodes.of(chunked), case.candidates)
    assert {name: c.to_pylist() for name, c in found.items()} == {
        name: c.to_pylist() for name, c in columns.items()
    }


def test_lists_have_room_for_more_than_two_to_the_31_neighbours(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert case.table["vq"].type == pa.large_list(pa.int32())
    expected = id_column(case.table["vq"])
    monkeypatch.setattr(raw_ids, "_MAX_OFFSET", 10)  # as if there were that many
    found = id_column(case.table["vq"])
    assert isinstance(found, IdLists)
    assert isinstance(expected, IdLists)
    assert raw_ids.to_raw_ids(case.table["vq"]).type == pa.large_list(pa.int64())
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    # Codes of before, in smaller lists, are read as ever.
    small = case.table["vq"].cast(pa.list_(pa.int32()))
    at = case.table.column_names.index("vq")
    kept = KeptCodes(case.table.set_column(at, "vq", small), pa.table({}))
    rows = np.array([4, 0, 9])
    new = KeptCodes(case.table, pa.table({}))
    np.testing.assert_array_equal(kept.neighbours(rows, 4), new.neighbours(rows, 4))


def test_a_catalogue_without_codes_or_histories_is_missing_everywhere(case: Case) -> None:
    empty = ItemCodes.of(case.table.slice(0, 0))
    assert set(candidate_columns(empty, case.candidates)["sid_0"].to_pylist()) == {MISSING_ID}
    none = pa.array([[]] * NUM_SAMPLES, pa.list_(pa.int64()))
    crosses = cross_columns(case.codes, case.candidates, none)
    assert crosses["shared_1"].to_pylist() == [[]] * NUM_SAMPLES
    assert (
        cross_columns(empty, case.candidates, case.history)["shared_1_count"].to_pylist()
        == [0.0] * NUM_SAMPLES
    )


def test_an_artifact_may_hold_vq_codes_only(case: Case) -> None:
    only = ItemCodes.of(case.table.select(["item_id", "vq", "vq_nearest"]))
    assert set(candidate_columns(only, case.candidates)) == {"vq", "vq_nearest"}
    assert cross_columns(only, case.candidates, case.history) == {}


def test_files_that_are_no_codes_are_refused(case: Case) -> None:
    twice = pa.concat_tables([case.table, case.table.slice(4, 1)])
    with pytest.raises(UserError, match=r"item 10\d\d has two rows of codes"):
        ItemCodes.of(twice)
    with pytest.raises(UserError, match="needs the columns item_id and sid_0 or vq"):
        ItemCodes.of(case.table.drop_columns(["sid_0", "vq"]))

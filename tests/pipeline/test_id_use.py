"""Ids that samples hold, against counting them in a dictionary; what tables do with them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedding.config import TableConfig
from embedding.feature_schema import FeatureSchema
from embedding.hashing import rows_of
from pipeline.planning import id_use
from pipeline.planning.id_use import FILE, IdUse, merge_uses, read_uses, use_of, write_uses
from pipeline.samples.table_ids import TableIds, table_ids


def use(*ids: int) -> IdUse:
    return use_of(np.array(ids, np.int64))


@given(st.lists(st.lists(st.integers(-1, 50) | st.integers(-1, 2**63 - 1)), max_size=4))
def test_counts_of_files_merge_into_the_counts_of_all(files: list[list[int]]) -> None:
    merged = merge_uses(use(*ids) for ids in files)

    counted = Counter(value for ids in files for value in ids)
    missing = counted.pop(-1, 0)
    assert dict(zip(merged.ids.tolist(), merged.id_lookups.tolist(), strict=True)) == counted
    assert (merged.level, merged.missing, merged.lookups) == (0, missing, counted.total())
    assert merged.distinct == len(counted)
    assert merged.ids.tolist() == sorted(counted)


def test_sample_of_many_ids_is_bounded_and_does_not_depend_on_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(id_use, "MAX_IDS", 1000)
    ids = np.random.default_rng(0).integers(0, 30_000, 200_000)
    distinct = len(np.unique(ids))

    whole = use_of(ids)
    parts = merge_uses(use_of(part) for part in np.array_split(ids, 7))

    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.id_lookups, parts.id_lookups)
    assert whole.level == parts.level > 0
    assert 250 < len(whole.ids) <= 1000
    counts = Counter(ids.tolist())
    assert whole.id_lookups.tolist() == [counts[value] for value in whole.ids.tolist()]
    # At least 500 of 30,000 are kept: four standard deviations of a binomial.
    assert whole.distinct == pytest.approx(distinct, rel=4 / 500**0.5)
    assert whole.lookups == 200_000


def test_uses_are_read_back_as_written(tmp_path: Path) -> None:
    uses = {"a": use(5, 5, -1, 2), "none": use(), "b": use(7)}

    write_uses(uses, tmp_path / FILE)
    found = read_uses(tmp_path / FILE, {name: each.facts for name, each in uses.items()})

    assert list(found) == list(uses)
    for name, each in uses.items():
        assert found[name].ids.tolist() == each.ids.tolist()
        assert found[name].id_lookups.tolist() == each.id_lookups.tolist()
        assert found[name].facts == each.facts
    write_uses({}, tmp_path / FILE)
    assert read_uses(tmp_path / FILE, {}) == {}


def tables_of(ids: dict[str, IdUse], folder: Path) -> dict[str, TableIds]:
    """Features `near` and `far` share the table `exact`; `word` has 20 hashed rows."""
    schema = FeatureSchema.model_validate(
        {
            "tables": [
                {"name": "exact", "num_embeddings": 11, "ids": {"kind": "identity"}},
                {"name": "words", "num_embeddings": 21},
                {"name": "owned", "num_embeddings": 11, "ids": {"kind": "managed_collision"}},
            ],
            "sparse": [
                {"name": "near", "table": "exact"},
                {"name": "far", "table": "exact"},
                {"name": "word", "table": "words"},
                {"name": "any", "table": "owned"},
            ],
        }
    )
    write_uses(ids, folder / FILE)
    found = table_ids(schema, folder, {name: each.facts for name, each in ids.items()})
    assert [each.table for each in found] == [table.name for table in schema.tables]
    return {each.table: each for each in found}


def test_ids_without_a_row_and_ids_that_share_one_are_counted(tmp_path: Path) -> None:
    words = list(range(15))
    ids = {
        "near": use(0, 9, 9, -1),
        "far": use(9, 10, 10, 2**63 - 1),
        "word": use(*words, *words),
        "any": use(1, 2**60, -1, -1),
    }

    found = tables_of(ids, tmp_path)

    exact = found["exact"]
    assert (exact.lookups, exact.distinct, exact.sampled) == (7, 4, False)
    assert exact.out_of_range == 3, "rows are there for 0 .. 9"
    assert exact.missing_share == 1 / 8
    assert exact.collision_rate is None
    schema_rows = rows_of(
        torch.tensor(words), TableConfig(name="words", num_embeddings=21)
    ).tolist()
    shared = sum(schema_rows.count(row) > 1 for row in schema_rows)
    assert found["words"].collision_rate == pytest.approx(shared / 15)
    assert found["words"].out_of_range is None
    assert (found["owned"].collision_rate, found["owned"].out_of_range) == (None, None)
    assert found["owned"].missing_share == 0.5


def test_estimates_of_a_sample_come_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_use, "MAX_IDS", 2000)
    ids = np.random.default_rng(1).integers(0, 20_000, 100_000)
    everything = {"near": use_of(ids), "far": use(), "word": use_of(ids), "any": use()}

    found = tables_of(everything, tmp_path)

    assert found["exact"].sampled
    assert found["exact"].out_of_range == pytest.approx((ids >= 10).sum(), rel=0.01)
    assert found["words"].collision_rate == pytest.approx(1.0)

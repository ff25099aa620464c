"""Item vectors from behaviour: items of the same users lie together."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_log import run_here

from embedding.feature_schema import HistoryConfig
from multimodal.codes.triggers import IdVectors
from pipeline.codes import id_vectors
from pipeline.codes.id_vectors import MAX_DIM, factorised_vectors
from pipeline.codes.positives import PairSource, read_positives
from pipeline.config import HeldOutItems
from pipeline.samples.buckets import bucket_file
from pipeline.samples.held_out import is_held_out
from pipeline.samples.ingest import STATE_FILE, IngestState
from pipeline.samples.partition import user_buckets

HISTORY = HistoryConfig(name="clicks", label="click")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_vectors, "stream_tasks", run_here)


def write(
    root: Path,
    day: str,
    users: np.ndarray,
    items: np.ndarray,
    clicks: np.ndarray,
    *,
    num_buckets: int = 1,
) -> None:
    """The events of a day of an ingest artifact."""
    folder = root / "events" / f"dt={day}"
    folder.mkdir(parents=True)
    table = pa.table({"user_id": users, "item_id": items, "click": clicks.astype(np.int8)})
    bucket_of = user_buckets(users, num_buckets)
    for bucket in range(num_buckets):
        pq.write_table(table.filter(pa.array(bucket_of == bucket)), folder / bucket_file(bucket))
    state = IngestState(last_day=day, num_buckets=num_buckets, histories=(), history_values={})
    (root / STATE_FILE).write_text(state.model_dump_json())


def likeness(found: IdVectors, ids: np.ndarray) -> np.ndarray:
    vectors = found.unit_RD[found.rows_of(ids)]
    return vectors @ vectors.T


def test_items_of_the_same_users_lie_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 200, 6000)
    groups = users % 4
    items = 100 + 4 * rng.integers(0, 20, 6000) + groups
    # Clicks of a later day, and events without a click, say the opposite: they must not be read.
    write(tmp_path, "2026-01-01", users, items, np.ones(6000))
    wrong = 100 + 4 * rng.integers(0, 20, 6000) + (groups + 1) % 4
    write(tmp_path, "2026-01-02", users, wrong, np.zeros(6000))
    write(tmp_path, "2026-01-03", users, wrong, np.ones(6000))

    days = ("2026-01-01", "2026-01-02")
    found = factorised_vectors(PairSource((tmp_path,), days, HISTORY), tmp_path)

    assert found is not None
    assert found.sorted_ids_N.tolist() == list(range(100, 180))
    assert found.unit_RD.shape == (80, MAX_DIM)
    nearest = (likeness(found, np.arange(100, 180)) - 2 * np.eye(80)).argmax(1)
    assert (nearest % 4 == np.arange(80) % 4).mean() > 0.9


def test_vectors_are_those_of_the_weighted_matrix_of_users_and_items(tmp_path: Path) -> None:
    """Two artifacts with other buckets, users in both; the decomposition is that of numpy."""
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, 60, 900), rng.integers(0, 25, 900)
    write(tmp_path / "a", "2026-01-01", users[:500], items[:500], np.ones(500), num_buckets=2)
    write(tmp_path / "b", "2026-01-02", users[500:], items[500:], np.ones(400), num_buckets=3)
    days = ("2026-01-01", "2026-01-02")

    source = PairSource((tmp_path / "a", tmp_path / "b"), days, HISTORY)
    found = factorised_vectors(source, tmp_path)

    counts = np.zeros((60, 25))
    np.add.at(counts, (users, items), 1)
    weighted = np.log1p(counts)
    weighted /= np.sqrt(weighted.sum(axis=1, keepdims=True))
    _, values, right = np.linalg.svd(weighted, full_matrices=False)
    factors = right[:24].T * values[:24]  # one less than there are items
    unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
    assert found is not None
    np.testing.assert_allclose(likeness(found, np.arange(25)), unit @ unit.T, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "scratch is gone"


def test_one_bucket_of_positives_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 500, 4000), rng.integers(0, 60, 4000)
    for number in (1, 8):
        write(
            tmp_path / str(number),
            "2026-01-01",
            users,
            items,
            np.ones(4000),
            num_buckets=number,
        )
    read: list[tuple[int, weakref.ref[pa.Table]]] = []

    def watched(*arguments: Any, **options: Any) -> pa.Table:
        assert all(table() is None for _, table in read)
        found = read_positives(*arguments, **options)
        read.append((found.num_rows, weakref.ref(found)))
        return found

    monkeypatch.setattr(id_vectors, "read_positives", watched)
    whole, cut = (
        factorised_vectors(PairSource((tmp_path / n,), ("2026-01-01",), HISTORY), tmp_path)
        for n in ("1", "8")
    )
    sizes = [num_rows for num_rows, _ in read]
    assert sizes[0] == 4000
    assert len(sizes) == 1 + 8, "every bucket is read once"
    assert sum(sizes[1:]) == 4000
    assert max(sizes[1:]) < 1000
    assert whole is not None
    assert cut is not None
    ids = np.arange(60)
    np.testing.assert_allclose(likeness(whole, ids), likeness(cut, ids), atol=1e-2)


def test_held_out_items_have_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 50, 900), rng.integers(0, 40, 900)
    write(tmp_path, "2026-01-01", users, items, np.ones(900))
    held_out = HeldOutItems(share=0.5)
    source = PairSource((tmp_path,), ("2026-01-01",), HISTORY, held_out)
    found = factorised_vectors(source, tmp_path)
    assert found is not None
    expected = np.arange(40)[~is_held_out(np.arange(40), held_out)]
    assert found.sorted_ids_N.tolist() == expected.tolist()
    assert 5 < len(expected) < 35


def test_too_little_behaviour_makes_no_vectors(tmp_path: Path) -> None:
    one = np.array([1])
    write(tmp_path, "2026-01-01", one, one, one)
    for day in ("2026-01-01", "2026-01-09"):
        assert factorised_vectors(PairSource((tmp_path,), (day,), HISTORY), tmp_path) is None

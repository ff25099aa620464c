"""Item vectors from behaviour: items of the same users lie together."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.config import HistoryConfig
from pipeline.config import HeldOutItems
from pipeline.held_out import is_held_out
from pipeline.id_vectors import MAX_DIM, id_vectors
from pipeline.mine_pairs import PairSource

HISTORY = HistoryConfig(name="clicks", label="click")


def write(root: Path, day: str, users: np.ndarray, items: np.ndarray, clicks: np.ndarray) -> None:
    folder = root / "events" / f"dt={day}"
    folder.mkdir(parents=True)
    table = pa.table({"user_id": users, "item_id": items, "click": clicks.astype(np.int8)})
    pq.write_table(table, folder / "bucket-0000.parquet")


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
    found = id_vectors(PairSource((tmp_path,), days, HISTORY))

    assert found is not None
    assert found.sorted_ids.tolist() == list(range(100, 180))
    assert found.unit_ND.shape == (80, MAX_DIM)
    nearest = (found.unit_ND @ found.unit_ND.T - 2 * np.eye(80)).argmax(1)
    assert (nearest % 4 == np.arange(80) % 4).mean() > 0.9


def test_held_out_items_have_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 50, 900), rng.integers(0, 40, 900)
    write(tmp_path, "2026-01-01", users, items, np.ones(900))
    held_out = HeldOutItems(share=0.5)
    found = id_vectors(PairSource((tmp_path,), ("2026-01-01",), HISTORY, held_out))
    assert found is not None
    expected = np.arange(40)[~is_held_out(np.arange(40), held_out)]
    assert found.sorted_ids.tolist() == expected.tolist()
    assert 5 < len(expected) < 35


def test_too_little_behaviour_makes_no_vectors(tmp_path: Path) -> None:
    one = np.array([1])
    write(tmp_path, "2026-01-01", one, one, one)
    assert id_vectors(PairSource((tmp_path,), ("2026-01-01",), HISTORY)) is None
    assert id_vectors(PairSource((tmp_path,), ("2026-01-09",), HISTORY)) is None

"""Pairs mined from ingest artifacts against loops over the raw log."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from small_log import DAYS, Row, event, file_bytes, make_recipe, write_catalogue, write_day

from embedding.errors import UserError
from embedding.feature_schema import HistoryConfig
from multimodal.codes.pair_config import Swing, User2Item
from multimodal.codes.triggers import IdVectors
from pipeline.codes import mine_pairs as mining
from pipeline.codes import positives
from pipeline.codes.align_facts import PairFacts
from pipeline.codes.mine_pairs import MiningPlan, mine_pairs, plan_mining
from pipeline.codes.positives import PairSource
from pipeline.samples import ingest as ingest_module
from pipeline.samples.ingest import check_span, ingest

SWING = Swing(min_common_users=2, num_neighbours=100)
CLICKS = HistoryConfig(name="clicks", label="click", max_length=3)
NUM_ITEMS, NUM_USERS = 12, 30


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(ingest_module, "stream_tasks", small_log.run_here)
    if "integration" not in request.keywords:
        monkeypatch.setattr(mining, "stream_tasks", small_log.run_here)


@pytest.fixture
def log(tmp_path: Path) -> list[Row]:
    """Four days; ingested as two artifacts with different numbers of user buckets."""
    rng = np.random.default_rng(0)
    write_catalogue(tmp_path / "data", NUM_ITEMS, NUM_USERS)
    rows = []
    for day in range(4):
        today = [
            event(
                day,
                int(rng.integers(1, NUM_USERS + 1)),
                second,
                item_id=int(rng.zipf(1.3) % NUM_ITEMS + 1),
                click=int(rng.random() < 0.6),
            )
            for second in range(150)
        ]
        write_day(tmp_path / "data", day, [today])
        rows += today
    previous = None
    for i, (span, buckets) in enumerate(((DAYS[:2], 2), (DAYS[2:], 3))):
        recipe = make_recipe(tmp_path / "data", user_buckets=buckets)
        scratch = tmp_path / f"ingest-{i}"
        scratch.mkdir()
        ingest(recipe, check_span(recipe, span, previous), scratch)
        previous = scratch
    return rows


def mine(
    tmp_path: Path, name: str, *, days: list[str], partitions: int = 2, share: float = 1.0
) -> PairFacts:
    artifacts = (tmp_path / "ingest-0", tmp_path / "ingest-1")
    source = PairSource(artifacts, tuple(days), CLICKS, share_positive=share)
    plan = plan_mining(source, SWING, User2Item(max_history=2), vectors(), tmp_path / name)
    changed = MiningPlan(**{**vars(plan), "num_partitions": partitions})
    return mine_pairs(changed)


def vectors() -> IdVectors:
    table = np.random.default_rng(4).standard_normal((NUM_ITEMS - 2, 3)).astype(np.float32)
    return IdVectors.of(np.arange(1, NUM_ITEMS - 1), table)  # two items have none


def read(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("*")) for row in pq.read_table(path).to_pylist()]


def clicked_sets(rows: list[Row]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for row in rows:
        if row["click"] == 1:
            found.setdefault(row["user_id"], set()).add(row["item_id"])
    return found


def test_item_pairs_equal_a_loop_over_the_training_days(tmp_path: Path, log: list[Row]) -> None:
    facts = mine(tmp_path, "pairs", days=DAYS[:3])

    engaged = clicked_sets(log[:450])  # the fourth day is not trained on
    expected: dict[tuple[int, int], float] = {}
    for u, v in combinations(engaged, 2):
        both = engaged[u] & engaged[v]
        weight = (len(engaged[u]) * len(engaged[v])) ** -0.5 / (1 + len(both))
        for i in both:
            for j in both - {i}:
                expected[i, j] = expected.get((i, j), 0.0) + weight
    found = {
        (r["item"], r["neighbour"]): r["similarity"] for r in read(tmp_path / "pairs/item2item")
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert facts.item2item_pairs == len(expected) > 50
    assert facts.num_positives == sum(row["click"] for row in log[:450])
    assert facts.num_users == len(engaged)
    assert facts.examples[0][2] == pytest.approx(max(expected.values()), rel=1e-5)
    assert (facts.first_day, facts.last_day) == (DAYS[0], DAYS[2])
    assert not (tmp_path / "pairs/lists").exists()


def test_user_pairs_equal_a_loop_over_histories(tmp_path: Path, log: list[Row]) -> None:
    facts = mine(tmp_path, "pairs", days=DAYS[:3])

    table = vectors()
    unit = dict(zip(table.sorted_ids_N.tolist(), table.unit_RD[table.rows_N], strict=True))
    expected = []
    for row in log[:450]:
        if row["click"] != 1 or row["item_id"] not in unit:
            continue
        past = [
            other["item_id"]
            for other in log
            if other["user_id"] == row["user_id"]
            and other["click"] == 1
            and other["timestamp"] < row["timestamp"]
        ][-2:]
        usable = [p for p in past if p in unit and p != row["item_id"]]
        if usable:
            best = max(usable, key=lambda p: float(unit[p] @ unit[row["item_id"]]))
            expected.append((best, row["item_id"]))
    found = [(r["trigger"], r["target"]) for r in read(tmp_path / "pairs/user2item")]
    assert sorted(found) == sorted(expected)
    assert facts.user2item_pairs == len(expected) > 50
    positives = facts.user2item_pairs + sum(facts.user2item_without.values())
    assert positives == facts.num_positives


def test_a_long_period_is_read_in_more_buckets_with_the_same_pairs(
    tmp_path: Path, log: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = mine(tmp_path, "few", days=DAYS)
    monkeypatch.setattr(positives, "ROWS_PER_BUCKET", 60)
    sizes: list[int] = []

    def watched(*arguments: Any, **options: Any) -> pa.Table:
        found = positives.read_positives(*arguments, **options)
        sizes.append(found.num_rows)
        return found

    monkeypatch.setattr(mining, "read_positives", watched)
    mine(tmp_path, "rare", days=DAYS, share=0.5)
    assert len(sizes) == 6, "300 of 600 events, 3 buckets doubled until 60 fit into each"
    sizes.clear()
    many = mine(tmp_path, "many", days=DAYS)

    assert len(sizes) == 12
    assert sum(sizes) == sum(row["click"] for row in log)
    for folder in ("item2item", "user2item"):
        assert ordered(tmp_path / "many" / folder) == ordered(tmp_path / "few" / folder)
    assert many == few


def ordered(folder: Path) -> list[tuple[object, ...]]:
    return sorted(tuple(row.values()) for row in read(folder))


def test_pairs_do_not_depend_on_the_number_of_partitions(tmp_path: Path, log: list[Row]) -> None:
    one = mine(tmp_path, "one", days=DAYS, partitions=1)
    five = mine(tmp_path, "five", days=DAYS, partitions=5)

    assert one == five

    def pairs(name: str) -> list[tuple]:
        return sorted(tuple(row.values()) for row in read(tmp_path / name / "item2item"))

    assert [row[:2] for row in pairs("one")] == [row[:2] for row in pairs("five")]
    scores = [[row[2] for row in pairs(name)] for name in ("one", "five")]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


def test_partitions_hold_no_more_list_entries_than_they_may(
    tmp_path: Path, log: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists are filed whole under each partition that they touch, which counts them anew."""
    monkeypatch.setattr(mining, "ENTRIES_PER_PARTITION", 100)
    swing = Swing(min_common_users=2, max_items_per_user=4)
    source = PairSource((tmp_path / "ingest-0", tmp_path / "ingest-1"), tuple(DAYS), CLICKS)
    plan = plan_mining(source, swing, User2Item(), None, tmp_path / "pairs")
    entries: list[int] = []

    def watched(*arguments: Any) -> Any:
        lists = joined(*arguments)
        entries.append(len(lists.items_N))
        return lists

    joined = mining.join_lists
    monkeypatch.setattr(mining, "join_lists", watched)
    mine_pairs(plan)

    once = sum(min(len(items), 4) for items in clicked_sets(log).values())
    assert len(entries) == plan.num_partitions == 1 + 600 * 4 // 100
    assert once < sum(entries) <= 100 * plan.num_partitions


@pytest.mark.parametrize("length", [1, 20, 200, 5000])
@pytest.mark.parametrize("positives", [0, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10])
def test_partitions_follow_from_positives_and_the_longest_list(positives: int, length: int) -> None:
    number = mining.num_partitions(positives, length)

    expected = positives * min(length, number) / number
    assert expected <= mining.ENTRIES_PER_PARTITION or number >= mining.MOST_PARTITIONS
    assert number <= max(mining.MOST_PARTITIONS, 1 + positives / mining.ROWS_PER_PARTITION)
    assert (number == 1) == (positives < mining.ROWS_PER_PARTITION)


def test_days_without_events_are_named(tmp_path: Path, log: list[Row]) -> None:
    with pytest.raises(UserError, match="no events between 2031-01-01 and 2031-01-01"):
        mine(tmp_path, "pairs", days=["2031-01-01"])


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_ray_writes_the_same_bytes(
    tmp_path: Path, log: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = mine(tmp_path, "ray", days=DAYS)
    monkeypatch.setattr(mining, "stream_tasks", small_log.run_here)

    assert mine(tmp_path, "here", days=DAYS) == distributed
    assert file_bytes(tmp_path / "here") == file_bytes(tmp_path / "ray")

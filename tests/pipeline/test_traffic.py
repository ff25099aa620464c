"""Measured lookups against plain counting, and the advice they give."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding import samples
from embedding.config import Identity, ManagedCollision, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.hashing import collision_rate, rows_of
from embedding.planning.id_distribution import IdDistribution
from embedding.planning.table_advice import table_facts
from embedding.planning.traffic import TableTraffic, Traffic, read_traffic
from pipeline.planning import traffic as traffic_module
from pipeline.planning.traffic import measure_traffic, sample_files
from pipeline.planning.traffic_view import growth_line

ROWS = 50
SCHEMA = FeatureSchema(
    tables=(
        TableConfig(name="item", num_embeddings=ROWS, embedding_dim=8, ids=Identity()),
        TableConfig(name="gap", num_embeddings=ROWS, embedding_dim=8, ids=Identity()),
    ),
    sparse=(SparseFeature(name="item_id", table="item"),),
    histories=(HistoryConfig(name="clicks", max_length=3),),
    sequences=(
        SequenceFeature(name="past", history="clicks", table="item"),
        SequenceFeature(name="ago", history="clicks", table="gap"),
    ),
)


def write_days(out: Path, num_days: int = 2) -> dict[str, list[tuple[int, list[int], list[int]]]]:
    """Joined days; (item, past items, gaps) of every row. The last one has items of its own."""
    rng = np.random.default_rng(0)
    days = {}
    for number in range(1, num_days + 1):
        day = f"2024-01-{number:02}"
        high = 20 if number < num_days else 30
        rows = [
            (
                int(rng.integers(1, high)),
                [int(i) for i in rng.integers(1, high, rng.integers(0, 4))],
                [],
            )
            for _ in range(40)
        ]
        rows = [(item, past, [1 + i % 5 for i in past]) for item, past, _ in rows]
        days[day] = rows
        folder = out / day / "join" / "samples" / f"dt={day}"
        folder.mkdir(parents=True)
        table = pa.table(
            {
                samples.sparse_column("item_id"): pa.array([r[0] for r in rows], pa.int64()),
                samples.sequence_column("past"): pa.array([r[1] for r in rows], LISTS),
                samples.sequence_column("ago"): pa.array([r[2] for r in rows], LISTS),
            }
        )
        pq.write_table(table.slice(0, 15), folder / "part-00000.parquet")
        pq.write_table(table.slice(15), folder / "part-00001.parquet")
    return days


LISTS = pa.list_(pa.int64())


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(run: Any, tasks: Any, shared: Any, rows: Any) -> Any:
        return (run(task, shared) for task in reversed(list(tasks)))

    monkeypatch.setattr(traffic_module, "stream_tasks", run_here)


@pytest.mark.usefixtures("in_this_process")
def test_lookups_are_counted_as_a_loop_counts_them(tmp_path: Path) -> None:
    *first, last = write_days(tmp_path, 14).values()
    first = [row for day in first for row in day]
    measured = measure_traffic(SCHEMA, sample_files(tmp_path, None))
    everything = first + last
    assert measured.rows == len(everything)
    assert measured.rows_per_day == len(everything) / 14
    assert measured.days == 14
    assert growth_line(measured) is None
    assert measured.ids_per_sample["item_id"] == 1
    past = sum(len(row[1]) for row in everything)
    assert measured.ids_per_sample["past"] == pytest.approx(past / len(everything))

    item = measured.table("item")
    assert item is not None
    lookups = Counter(i for row in everything for i in (row[0], *row[1]))
    assert item.lookups == sum(lookups.values())
    assert item.rows_touched == len(lookups)
    assert item.rows_seen_once == sum(count == 1 for count in lookups.values())
    assert item.highest_row == 1 + max(lookups)  # identity ids lie behind the OOV row
    before = {i for row in first for i in (row[0], *row[1])}
    now = {i for row in last for i in (row[0], *row[1])}
    assert item.new_rows_per_day == len(now - before) > 0
    ordered = sorted(lookups.values(), reverse=True)
    ids = IdDistribution(item.bin_rows, item.bin_shares)
    assert ids.share_of_hottest(3) == pytest.approx(sum(ordered[:3]) / item.lookups, abs=0.01)

    gap = measured.table("gap")
    assert gap is not None
    assert gap.lookups == sum(len(row[2]) for row in everything)


def test_a_day_that_several_runs_joined_counts_once(tmp_path: Path) -> None:
    write_days(tmp_path)
    again = tmp_path / "2024-01-05" / "join" / "samples" / "dt=2024-01-01"
    again.mkdir(parents=True)
    before = tmp_path / "2024-01-01" / "join" / "samples" / "dt=2024-01-01"
    shutil.copy(before / "part-00001.parquet", again / "part-00000.parquet")
    found = sample_files(tmp_path, None)
    own = tmp_path / "2024-01-02" / "join" / "samples" / "dt=2024-01-02"
    assert found == [again / "part-00000.parquet", *sorted(own.iterdir())]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("num_days", "said"), [(1, "of 1 day,"), (13, "of 13 days, and below 14")])
def test_few_days_say_nothing_of_growth(tmp_path: Path, num_days: int, said: str) -> None:
    write_days(tmp_path, 14)
    measured = measure_traffic(SCHEMA, sample_files(tmp_path, f"2024-01-{num_days:02}"))
    assert measured.rows == 40 * num_days
    assert all(table.new_rows_per_day is None for table in measured.tables)
    assert said in (growth_line(measured) or "")


@pytest.mark.usefixtures("in_this_process")
def test_samples_of_another_recipe_are_refused(tmp_path: Path) -> None:
    write_days(tmp_path)
    sparse = (*SCHEMA.sparse, SparseFeature(name="colour", table="item"))
    other = SCHEMA.model_copy(update={"sparse": sparse})
    with pytest.raises(UserError, match="lacks the columns .*colour.*join it again"):
        measure_traffic(other, sample_files(tmp_path, None))


def test_no_samples_and_no_traffic_file_are_said(tmp_path: Path) -> None:
    command = f"braid stage join --recipe NAME --date 2024-01-02 --out {tmp_path}`"
    with pytest.raises(UserError, match=f"has no joined samples up to 2024-01-02;.*{command}"):
        sample_files(tmp_path, "2024-01-02")
    with pytest.raises(UserError, match="has no joined samples;.*--date YYYY-MM-DD"):
        sample_files(tmp_path, None)
    with pytest.raises(UserError, match="does not exist"):
        read_traffic(tmp_path / "none.json", SCHEMA)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="is no traffic file of this version"):
        read_traffic(tmp_path / "other.json", SCHEMA)


def traffic_of(**rows: int) -> Traffic:
    """One lookup of each of these tables, which had so many rows."""
    return Traffic(
        rows=1,
        rows_per_day=1,
        tables=tuple(
            TableTraffic(
                table=name,
                num_rows=number,
                lookups=1,
                rows_touched=1,
                rows_seen_once=1,
                bin_rows=(1.0,),
                bin_shares=(1.0,),
            )
            for name, number in rows.items()
        ),
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"colour": ROWS, "size": ROWS},
            r"none of the recipe's .*'item', 'gap'.* measure it again",
        ),
        ({}, r"is of the tables \[\], and none of the recipe's"),
        ({"item": ROWS - 1}, f"'item' had {ROWS - 1} rows .* has {ROWS} now.* measure it again"),
    ],
)
def test_traffic_of_other_tables_or_rows_is_refused(
    tmp_path: Path, rows: dict[str, int], message: str
) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(traffic_of(**rows).model_dump_json())
    with pytest.raises(UserError, match=message):
        read_traffic(path, SCHEMA)


def test_traffic_of_some_of_the_tables_is_read(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(traffic_of(item=ROWS, colour=3).model_dump_json())
    assert read_traffic(path, SCHEMA) == traffic_of(item=ROWS, colour=3)


def advice_for(counts: np.ndarray, highest_row: int | None = None, **changes: object) -> str:
    """Advice for a table of 1,000 rows and 16 dims whose touched rows have these lookups."""
    table = TableConfig(name="t", num_embeddings=1000, embedding_dim=16)
    table = table.model_copy(update=changes)
    ordered = np.sort(counts)[::-1]
    measured = TableTraffic(
        table="t",
        num_rows=table.num_embeddings,
        lookups=int(counts.sum()),
        rows_touched=len(counts),
        rows_seen_once=int((counts == 1).sum()),
        highest_row=highest_row,
        bin_rows=(1.0,) * len(ordered),
        bin_shares=tuple(ordered / ordered.sum()),
    )
    (facts,) = table_facts((table,), Traffic(rows=1, rows_per_day=1, tables=(measured,)))
    return " | ".join(facts.advice)


def test_advice_fits_the_traffic() -> None:
    plenty = np.full(600, 100)
    assert advice_for(plenty) == ""
    assert advice_for(np.full(950, 100), ids=Identity()) == ""
    assert "at most 8 of its 16 dims: embedding_dim=8" in advice_for(plenty[:8])
    rare = np.concatenate([np.ones(400), np.full(200, 3)]).astype(int)
    assert "67% of its rows in use were seen once" in advice_for(rare)
    assert "try embedding_dim=8" in advice_for(rare)
    skewed = np.concatenate([np.full(10, 100_000), np.full(590, 2)])
    assert "a cache of 1% of its rows answers up to 100%" in advice_for(skewed)


def test_managed_tables_may_shrink_to_their_ids_with_room() -> None:
    unused = np.full(200, 100)
    said = advice_for(unused, ids=ManagedCollision())
    assert "80% of its rows were never looked up: num_embeddings=300 holds as many ids" in said
    assert "leaves 50% room and saves 70%" in said


def test_identity_tables_keep_the_row_of_every_id_that_was_looked_up() -> None:
    """200 ids of 1,000: cut to 300 rows, all ids above 298 would lose theirs."""
    unused = np.full(200, 100)
    assert advice_for(unused, highest_row=990, ids=Identity()) == ""
    assert advice_for(unused, highest_row=None, ids=Identity()) == ""
    said = advice_for(unused, highest_row=399, ids=Identity())
    assert "num_embeddings=600 holds every id that was looked up" in said
    assert "saves 40%" in said


def shares_a_row(num_ids: int, num_rows: int) -> float:
    """Of hashed ids, by hashing them."""
    table = TableConfig(name="t", num_embeddings=num_rows)
    return collision_rate(torch.arange(num_ids), table)


def rows_in_use(num_ids: int, num_rows: int) -> int:
    table = TableConfig(name="t", num_embeddings=num_rows)
    return len(set(rows_of(torch.arange(num_ids), table).tolist()))


@pytest.mark.parametrize(
    ("num_ids", "sentence"),
    [
        (5_000, r"num_embeddings=(\d+) saves .*, and (\d+)% of its ids instead of (\d+)% would"),
        (150_000, r"about (\d+)% of its ids share .*num_embeddings=(\d+) would .* to (\d+)%"),
    ],
)
def test_hashed_tables_are_advised_by_what_their_ids_share(num_ids: int, sentence: str) -> None:
    """Fewer rows than four an id would make many more ids share one; more rows, many fewer."""
    rows = 50_000
    said = advice_for(np.full(rows_in_use(num_ids, rows), 100), num_embeddings=rows)
    found = re.search(sentence, said)
    assert found is not None, said
    numbers = [int(text) for text in found.groups()]
    advised, *shares = sorted(numbers, reverse=True)
    assert advised == pytest.approx(4 * num_ids, rel=0.06)  # rounded up to two figures
    expected = [100 * shares_a_row(num_ids, n) for n in (rows, advised)]
    assert shares == pytest.approx(sorted(expected, reverse=True), abs=1.5)


def test_hashed_tables_with_two_to_four_rows_an_id_stay() -> None:
    assert "num_embeddings" not in advice_for(np.full(300, 100))


def test_hit_rates_are_those_of_the_hottest_rows() -> None:
    counts = np.arange(1, 501)
    table = TableConfig(name="t", num_embeddings=1000, embedding_dim=16)
    measured = TableTraffic(
        table="t",
        num_rows=1000,
        lookups=int(counts.sum()),
        rows_touched=500,
        rows_seen_once=1,
        bin_rows=(1.0,) * 500,
        bin_shares=tuple(counts[::-1] / counts.sum()),
    )
    (facts,) = table_facts((table,), Traffic(rows=1, rows_per_day=1, tables=(measured,)))
    for share, hit in facts.hit_rates.items():
        hottest = counts[::-1][: round(1000 * share)]
        assert hit == pytest.approx(hottest.sum() / counts.sum())

"""Histories that the log delivers, against those that ingest computes of the same events."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from small_log import DAYS, TIMESTAMP, Row, event, make_recipe, write_catalogue, write_day

from embedding.errors import UserError
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.columns import EventColumns
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.samples.join import join

COLUMNS = {"item_id": "recent_items", "timestamp": "recent_times", "stars": "recent_stars"}
TYPES = {
    "recent_items": pa.list_(pa.int64()),
    "recent_times": pa.large_list(TIMESTAMP),
    "recent_stars": pa.list_(pa.int32()),
}


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", small_log.run_here)


def past_clicks(row: Row, log: Sequence[Row]) -> list[Row]:
    """All earlier clicks of the user, oldest first."""
    earlier = [r for r in log if r["user_id"] == row["user_id"] and r["click"] == 1]
    earlier = [r for r in earlier if r["timestamp"] < row["timestamp"]]
    return sorted(earlier, key=lambda r: r["timestamp"])


def write_log(root: Path, changes: dict[int, Row] | None = None) -> None:
    """Two days of events that hold the user's earlier clicks; some rows with other lists."""
    write_catalogue(root)
    log: list[Row] = []
    for day in (0, 1):
        rows = [
            event(day, 1 + s % 2, 7 * s + 1, item_id=1 + s % 4, stars=1 + s % 3)
            | {"request_id": 100 * day + s, "click": int(s % 3 > 0)}
            for s in range(16)
        ]
        log += rows
        write_day(root, day, [rows])
        path = root / "events" / f"dt={DAYS[day]}" / "part-00000.parquet"
        table = pq.read_table(path)
        lists = [
            {
                "recent_items": [past["item_id"] for past in past_clicks(row, log)] or None,
                "recent_times": [past["timestamp"] for past in past_clicks(row, log)],
                "recent_stars": [past["stars"] for past in past_clicks(row, log)],
            }
            | (changes or {}).get(row["request_id"], {})
            for row in rows
        ]
        table = table.append_column("words", pa.array([["shoe"]] * len(rows)))
        for name, kind in TYPES.items():
            table = table.append_column(name, pa.array([row[name] for row in lists], kind))
        pq.write_table(table, path, row_group_size=5)


def recipe_of(root: Path, columns: dict[str, str] | None) -> Recipe:
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["features"]["histories"][0]["columns"] = columns
    return Recipe.model_validate(recipe)


def run(recipe: Recipe, folder: Path) -> tuple[list[Row], IngestFacts]:
    """Samples by request, and the facts, of two days that are ingested one after the other."""
    samples: list[Row] = []
    previous = None
    for day in DAYS[:2]:
        ingested, joined = folder / day / "ingest", folder / day / "join"
        ingested.mkdir(parents=True)
        joined.mkdir()
        facts = ingest(recipe, check_span(recipe, [day], previous), ingested)
        join(recipe, ingested, joined)
        for path in joined.glob("samples/*/*.parquet"):
            samples += pq.ParquetFile(path).read().to_pylist()
        previous = ingested
    return sorted(samples, key=lambda row: row["key:request_id"]), facts


def test_samples_are_those_of_a_computed_history(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root)

    computed, facts = run(recipe_of(root, None), tmp_path / "computed")
    delivered, delivered_facts = run(recipe_of(root, COLUMNS), tmp_path / "delivered")

    assert delivered == computed
    lengths = {len(row["sequence:past_item"]) for row in delivered}
    assert lengths == {0, 1, 2, 3}, "longer lists are cut to the latest"
    assert delivered_facts.mean_history_length == facts.mean_history_length
    assert delivered_facts.quarantined == {}


def test_a_file_of_empty_lists_needs_no_types(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root)
    path = root / "events" / f"dt={DAYS[0]}" / "part-00000.parquet"
    table = pq.read_table(path)
    for name in TYPES:
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array([[]] * table.num_rows, pa.list_(pa.null())))
    pq.write_table(table, path)

    samples, facts = run(recipe_of(root, COLUMNS), tmp_path / "out")
    assert facts.quarantined == {}
    assert not any(row["sequence:past_item"] for row in samples if row["key:request_id"] < 100)
    assert any(row["sequence:past_item"] for row in samples)


def test_only_what_a_sequence_reads_must_be_delivered(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root)
    recipe = recipe_of(root, None).model_dump(mode="json")
    features = recipe["features"]
    features["histories"][0]["columns"] = {"item_id": "recent_items"}
    read = ("past_item", "past_category", "seen_item")
    features["sequences"] = [s for s in features["sequences"] if s["name"] in read]
    features["tables"] = [t for t in features["tables"] if t["name"] not in ("stars", "gap")]
    recipe["evaluation"]["held_out_items"] = {"share": 0.5}
    recipe["window"]["warm_start"] = False

    samples, _ = run(Recipe.model_validate(recipe), tmp_path / "out")
    shown = {row["key:item_id"] for row in samples}
    past = {item for row in samples for item in row["sequence:past_item"]}
    assert past
    assert past <= shown, "held-out items are in no history"
    assert len(shown) < 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"recent_items": [1]}, "lists of history clicks of different lengths"),
        (
            {"recent_items": [1, None, 2], "recent_stars": [1, 1, 1]},
            "null in a list of history clicks",
        ),
        (
            {"recent_items": [1], "recent_stars": [1], "recent_times": "own"},
            "history clicks holds an event that is not earlier",
        ),
        (
            {"recent_items": [3, 2, 1], "recent_stars": [1, 1, 1], "recent_times": "newest first"},
            "history clicks is not ordered by time, oldest first",
        ),
    ],
)
def test_lists_that_cannot_be_right_are_put_aside(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    root = tmp_path / "data"
    own = small_log.START_MS + 8 * 1000  # of request 1
    times = {None: [own - 3, own - 2, own - 1], "own": [own], "newest first": [own - 1, own - 2, 1]}
    times = times[change.get("recent_times")]
    write_log(root, {1: {"recent_stars": [], **change, "recent_times": times}})
    recipe = recipe_of(root, COLUMNS)
    (tmp_path / "ingest").mkdir()

    facts = ingest(recipe, check_span(recipe, DAYS[:1], None), tmp_path / "ingest")
    assert facts.quarantined == {reason: 1}
    (path,) = (tmp_path / "ingest" / "quarantine").glob("*.parquet")
    assert pq.read_table(path)["request_id"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        (COLUMNS | {"item_id": "device"}, "must be a list of integers or strings"),
        (COLUMNS | {"item_id": "words"}, "must be a list of ids like those of item_id (int64)"),
        (COLUMNS | {"timestamp": "recent_items"}, "cast it to list<timestamp('ms')>"),
        (COLUMNS | {"stars": "no_such"}, "lacks the columns ['no_such']"),
    ],
)
def test_columns_that_hold_no_history_are_refused(
    tmp_path: Path, columns: dict[str, str], fault: str
) -> None:
    root = tmp_path / "data"
    write_log(root)
    with pytest.raises(UserError) as caught:
        check_span(recipe_of(root, columns), DAYS[:1], None)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"timestamp": "recent_times"}, "name their column: item_id"),
        ({"item_id": "recent_items", "stars": "recent_stars"}, "'past_gap'.* lack 'timestamp'"),
        ({"item_id": "recent_items", "timestamp": "recent_times"}, "'past_stars'.* lack 'stars'"),
    ],
)
def test_a_recipe_names_all_that_its_sequences_read(
    tmp_path: Path, columns: dict[str, str], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        recipe_of(tmp_path, columns)


def test_pairs_need_to_know_which_events_a_logged_history_holds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, COLUMNS).model_dump(mode="json")
    recipe["codes"] = {"vectors": {"kind": "aligned", "content": {"text": {"model": "tiny"}}}}
    recipe["codes"]["rq"] = {"num_levels": 2, "codebook_size": 4}
    Recipe.model_validate(recipe)

    recipe["features"]["histories"][0]["label"] = None
    with pytest.raises(ValueError, match="'clicks', which the log delivers, has no label"):
        Recipe.model_validate(recipe)


def test_rows_with_long_lists_come_in_smaller_pieces(tmp_path: Path) -> None:
    columns = EventColumns.of(recipe_of(tmp_path, COLUMNS))
    assert columns.row_weight == 1 + 3 * 3 / 16  # three lists of at most three events
    assert EventColumns.of(recipe_of(tmp_path, None)).row_weight == 1

"""Ingest against a loop over all events; chaining of spans; reproducible files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_log import DAYS, Row, event, file_bytes, make_recipe, write_catalogue, write_day

from embedding.errors import UserError
from embedding.raw_ids import to_raw_ids
from pipeline.artifacts import MANIFEST, Manifest
from pipeline.config import Recipe
from pipeline.event_files import DayFiles
from pipeline.samples import buckets as buckets_module
from pipeline.samples import ingest as ingest_module
from pipeline.samples.buckets import merge_counts
from pipeline.samples.columns import EventColumns
from pipeline.samples.contract import EventFile
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.ingest_facts import IngestFacts


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "integration" not in request.keywords:
        monkeypatch.setattr(ingest_module, "stream_tasks", small_log.run_here)


def run(recipe: Recipe, span: list[str], previous: Path | None, scratch: Path) -> IngestFacts:
    scratch.mkdir()
    return ingest(recipe, check_span(recipe, span, previous), scratch)


def delayed(recipe: Recipe, delay_s: int) -> Recipe:
    """With clicks that enter their history so much later."""
    clicks, *others = recipe.features.histories
    histories = (clicks.model_copy(update={"delay_s": delay_s}), *others)
    features = recipe.features.model_copy(update={"histories": histories})
    return recipe.model_copy(update={"features": features})


def raw_id(text: str) -> int:
    """Of a string."""
    found: int = to_raw_ids(pa.array([text]))[0].as_py()
    return found


def read_events(directory: Path) -> list[Row]:
    """All events of an artifact, timestamps as integers."""
    return [
        row
        for path in sorted((directory / "events").rglob("*.parquet"))
        for row in pq.ParquetFile(path).read().to_pylist()
    ]


def naive_history(
    row: Row, log: list[Row], *, label: str | None, max_length: int, delay_s: int = 0
) -> list[Row]:
    earlier = [
        other
        for other in log
        if other["user_id"] == row["user_id"]
        and other["timestamp"] + 1000 * delay_s < row["timestamp"]
        and (label is None or other[label] == 1)
    ]
    # Python's sort is stable: equal timestamps stay in the order of the log.
    return sorted(earlier, key=lambda other: other["timestamp"])[-max_length:]


def check_against_log(events: list[Row], log: list[Row], delay_s: int = 0) -> None:
    assert sorted(e["request_id"] for e in events) == sorted(e["request_id"] for e in log)
    for row in events:
        clicks = naive_history(row, log, label="click", max_length=3, delay_s=delay_s)
        seen = naive_history(row, log, label=None, max_length=2)
        for name, expected in (("clicks", clicks), ("seen", seen)):
            assert row[f"history:{name}:timestamp"] == [e["timestamp"] for e in expected]
            assert all(t < row["timestamp"] for t in row[f"history:{name}:timestamp"])
            assert row[f"history:{name}:item_id"] == [e["item_id"] for e in expected]
        stars = [e["stars"] for e in clicks]
        assert row["history:clicks:stars"] == [-1 if s is None else s for s in stars]


LOGS = st.lists(
    st.tuples(
        st.integers(0, 3),  # day
        st.integers(1, 3),  # user
        st.integers(0, 5),  # second: ties are frequent
        st.integers(1, 4),  # item
        st.sampled_from([0, 1, 1, None]),
        st.sampled_from([None, 1, 2, 3]),
    ),
    max_size=40,
)
CUTS = st.sampled_from([(4,), (1, 4), (2, 4), (1, 2, 4), (1, 2, 3, 4)])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    log=LOGS,
    cuts=CUTS,
    buckets=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    delay_s=st.sampled_from([0, 2, 24 * 3600, 30 * 3600]),
)
def test_chained_spans_give_the_histories_of_the_whole_log(
    tmp_path_factory: pytest.TempPathFactory,
    log: list[tuple[Any, ...]],
    cuts: tuple[int, ...],
    buckets: list[int],
    delay_s: int,
) -> None:
    root = tmp_path_factory.mktemp("log")
    write_catalogue(root)
    rows = []
    for day in range(4):
        own = [entry for entry in log if entry[0] == day]
        own.append((day, 5, 0, 1, 0, None))  # no day is empty
        events = [
            event(day, user, second, item_id=item, click=click, stars=stars)
            for _, user, second, item, click, stars in own
        ]
        for e in events:
            e["request_id"] = len(rows)
            rows.append(e)
        write_day(root, day, [events[:3], events[3:]])

    previous, found, start = None, [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "stream_tasks", small_log.run_here)
        for i, end in enumerate(cuts):
            recipe = delayed(make_recipe(root, user_buckets=buckets[i]), delay_s)
            artifact = root / f"ingest-{i}"
            facts = run(recipe, DAYS[start:end], previous, artifact)
            assert facts.rows_out == facts.rows_in
            assert facts.first_day == DAYS[0]
            assert (facts.days, facts.previous is None) == (tuple(DAYS[start:end]), not start)
            manifest = Manifest(stage="ingest", artifact_id="", config_hash="", facts=facts)
            (artifact / MANIFEST).write_text(manifest.model_dump_json())
            found += read_events(artifact)
            previous, start = artifact, end
    assert previous is not None

    check_against_log(found, rows, delay_s)
    counts = {c["item_id"]: c for c in pq.read_table(previous / "item_counts.parquet").to_pylist()}
    for item in {row["item_id"] for row in rows}:
        own_rows = [row for row in rows if row["item_id"] == item]
        assert counts[item]["events"] == len(own_rows)
        assert counts[item]["positives"] == sum(row["click"] == 1 for row in own_rows)
        first = small_log.day_name(min(row["timestamp"] for row in own_rows))
        assert counts[item]["first_day"].isoformat() == first
    users = pq.read_table(previous / "user_counts.parquet")
    assert users["user_id"].to_pylist() == sorted({row["user_id"] for row in rows})


def small_root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (0, 1):
        rows = [event(day, user, s, click=(s + user) % 2) for s in range(12) for user in (1, 2, 3)]
        write_day(root, day, [rows[:20], rows[20:]])
    return root


def test_facts_count_rows_labels_and_days(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()

    recipe = make_recipe(small_root(tmp_path))
    facts = ingest(
        recipe,
        check_span(recipe, DAYS[:2], None),
        tmp_path / "out",
        progress=lambda done, total: progress.append((done, total)),
    )

    assert (facts.rows_in, facts.rows_out, facts.quarantined) == (72, 72, {})
    assert facts.rows_per_day == {DAYS[0]: 36, DAYS[1]: 36}
    assert (facts.labels["click"].observed, facts.labels["click"].rate) == (72, 0.5)
    assert (facts.num_items, facts.num_users) == (1, 3)
    events = read_events(tmp_path / "out")
    lengths = [len(e["history:clicks:item_id"]) for e in events]
    assert facts.mean_history_length["clicks"] == pytest.approx(sum(lengths) / 72)
    assert progress[-1] == (144, 144)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_a_file_that_comes_while_files_are_listed_is_not_taken_for_one_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_catalogue(tmp_path)
    write_day(tmp_path, 0, [[event(0, 1, 60)]])
    listed = ingest_module.event_files

    def and_deliver(root: Path, day: str, columns: EventColumns) -> list[EventFile]:
        found = listed(root, day, columns)
        shutil.copyfile(found[0].path, found[0].path.with_name("part-00009.parquet"))
        return found

    monkeypatch.setattr(ingest_module, "event_files", and_deliver)
    checked = check_span(make_recipe(tmp_path), DAYS[:1], None)
    assert checked.num_rows == 1
    assert checked.day_files[DAYS[0]].content != DayFiles.of(tmp_path, DAYS[0]).content


def test_images_are_not_looked_at(tmp_path: Path) -> None:
    """Without towers nothing reads them: a damaged one must not stop a recipe."""
    root = small_root(tmp_path)
    items = pq.read_table(root / "items.parquet")
    images = pa.array([b"no picture"] * items.num_rows, pa.binary())
    pq.write_table(items.append_column("image", images), root / "items.parquet")

    facts = run(make_recipe(root, max_quarantined_share=0.01), DAYS[:1], None, tmp_path / "out")

    assert facts.rows_out == facts.rows_in
    assert not list((tmp_path / "out").glob("*image*"))


def test_events_of_a_file_are_sorted_by_time(tmp_path: Path) -> None:
    run(make_recipe(small_root(tmp_path)), DAYS[:2], None, tmp_path / "out")

    for path in (tmp_path / "out" / "events").rglob("*.parquet"):
        times = pq.ParquetFile(path).read()["timestamp"].to_pylist()
        assert times == sorted(times)
    assert not (tmp_path / "out" / "parts").exists()


def test_bad_rows_go_to_quarantine_with_reason_and_source(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    nan = float("nan")
    bad = {
        "null request_id": {"request_id": None},
        "null user_id": {"user_id": None},
        "null item_id": {"item_id": None},
        "null timestamp": {"timestamp": None},
        "timestamp outside of the dt day": event(1, 1, 0),
        "label click not 0, 1 or null": {"click": 2},
        "NaN or inf in dense column price": {"price": nan},
        "item_id without catalogue row": {"item_id": 99},
        "user_id without row in users.parquet": {"user_id": 99},
    }
    sound = [event(0, 1, s) for s in range(20)] + [event(0, 1, 30, click=None, price=None)]
    faulty = [event(0, 1, 40) | change for change in bad.values()]
    faulty += [event(0, 1, 50, price=float("inf")), event(0, 1, 51, price=-1e300)]
    write_day(root, 0, [sound, faulty])

    facts = run(make_recipe(root), DAYS[:1], None, tmp_path / "out")

    assert (facts.rows_in, facts.rows_out) == (len(sound) + len(faulty), len(sound))
    once = dict.fromkeys(bad, 1)
    assert facts.quarantined == {**once, "NaN or inf in dense column price": 3}
    assert len(read_events(tmp_path / "out")) == len(sound)
    parts = sorted((tmp_path / "out" / "quarantine").glob("*.parquet"))
    aside = pa.concat_tables([pq.ParquetFile(part).read() for part in parts]).to_pylist()
    assert [row["reason"] for row in aside] == [*bad, *["NaN or inf in dense column price"] * 2]
    assert {row["source_file"] for row in aside} == {f"dt={DAYS[0]}/part-00001.parquet"}
    assert [row["source_row"] for row in aside] == list(range(len(faulty)))
    assert [row["click"] for row in aside].count(2) == 1


def test_too_many_bad_rows_fail_with_place_reason_and_remedy(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    write_day(root, 0, [[event(0, 1, s) for s in range(8)] + [event(0, 1, 9, click=2)] * 2])

    with pytest.raises(UserError) as error:
        run(make_recipe(root, max_quarantined_share=0.1), DAYS[:1], None, tmp_path / "out")

    message = str(error.value)
    assert "2 of 10 events" in message
    assert "2 x label click not 0, 1 or null" in message
    assert "part-00000.parquet row 8" in message
    assert "data.max_quarantined_share=0.1" in message
    assert "raise the limit" in message


@pytest.mark.parametrize("again", [False, True], ids=["wrong labels", "delivered twice"])
def test_a_day_that_is_all_wrong_fails_among_many_others(tmp_path: Path, again: bool) -> None:
    """As it does where each day is a span; of all rows it is less than a sixth."""
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (0, 2):
        write_day(root, day, [[event(day, 1, s) for s in range(20)]])
    rows = [event(1, 1, s, click=1 if again else 2) for s in range(5)]
    write_day(root, 1, [rows, rows] if again else [rows])

    with pytest.raises(UserError) as error:
        run(make_recipe(root, max_quarantined_share=0.4), DAYS[:3], None, tmp_path / "out")

    number = "5 of 10" if again else "5 of 5"
    first = f"{root / 'events' / f'dt={DAYS[1]}'}/part-00000.parquet row 0"
    if again:
        first = f"request_id 0, user_id 1, item_id 1, timestamp {rows[0]['timestamp']}"
    assert f"{number} events of {DAYS[1]} break the data contract" in str(error.value)
    assert f"first in {first}" in str(error.value)


def test_a_file_that_was_delivered_twice_counts_once(tmp_path: Path) -> None:
    """Not another item, request, user or time: those are other events."""
    root = tmp_path / "data"
    write_catalogue(root)
    rows = [event(0, 1 + s % 2, s, click=s % 2, item_id=1 + s % 4) for s in range(8)]
    near = [
        {**rows[3], "item_id": 1},
        {**rows[3], "request_id": 99},
        {**rows[3], "user_id": 3},
        {**rows[3], "timestamp": rows[3]["timestamp"] + 1},
    ]
    again = [{**row, "device": "copy"} for row in rows]
    write_day(root, 0, [rows + near, again])
    write_day(root, 1, [[event(1, 1, 0)]])

    facts = run(make_recipe(root), DAYS[:2], None, tmp_path / "twice")

    assert (facts.rows_in, facts.rows_out) == (21, 13)
    assert facts.quarantined == {"repeats an earlier event": 8}
    assert facts.rows_per_day == {DAYS[0]: 12, DAYS[1]: 1}
    assert (facts.labels["click"].observed, facts.labels["click"].positives) == (13, 4 + 4 + 1)
    events = read_events(tmp_path / "twice")
    assert {row["device"] for row in events} == {raw_id("phone")}, "the first of the log is kept"
    check_against_log(events, [*rows, *near, event(1, 1, 0)])
    counts = pq.read_table(tmp_path / "twice" / "item_counts.parquet")
    assert sum(counts["events"].to_pylist()) == 13
    parts = sorted((tmp_path / "twice" / "quarantine").glob("repeats-*.parquet"))
    aside = pa.concat_tables([pq.read_table(part) for part in parts]).to_pylist()
    assert sorted(row["request_id"] for row in aside) == list(range(8))
    assert {(row["device"], row["reason"]) for row in aside} == {
        (raw_id("copy"), "repeats an earlier event")
    }


def test_more_repeats_than_allowed_fail_with_one_of_them(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    rows = [event(0, 1, s) for s in range(8)]
    write_day(root, 0, [rows, rows])

    refusal = (
        r"8 of 16 events .*=0.4 allows \(8 x repeats an earlier event\), first in request_id 0"
    )
    with pytest.raises(UserError, match=refusal):
        run(make_recipe(root, max_quarantined_share=0.4), DAYS[:1], None, tmp_path / "out")


def test_string_ids_meet_their_catalogue_rows(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for name, key in (("items", "item_id"), ("users", "user_id")):
        table = pq.read_table(root / f"{name}.parquet")
        table = table.set_column(0, key, table[key].cast(pa.string()))
        pq.write_table(table, root / f"{name}.parquet")
    write_day(root, 0, [[event(0, 1, s, item_id=1 + s % 4) for s in range(6)]])
    path = root / "events" / f"dt={DAYS[0]}" / "part-00000.parquet"
    events = pq.ParquetFile(path).read()
    for key in ("user_id", "item_id"):
        at = events.column_names.index(key)
        events = events.set_column(at, key, events[key].cast(pa.string()))
    pq.write_table(events, path)

    facts = run(make_recipe(root), DAYS[:1], None, tmp_path / "out")

    assert (facts.rows_out, facts.num_items) == (6, 4)
    lengths = [len(e["history:clicks:item_id"]) for e in read_events(tmp_path / "out")]
    assert lengths == [0, 1, 2, 3, 3, 3]


def test_buckets_grow_with_the_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "ROWS_PER_BUCKET", 10)
    root = small_root(tmp_path)

    facts = run(make_recipe(root, user_buckets=2), DAYS[:1], None, tmp_path / "a")  # 36 rows
    after = run(make_recipe(root, user_buckets=1), DAYS[1:2], tmp_path / "a", tmp_path / "b")

    # The second day has 36 rows, too, and what the first left of three users.
    assert (facts.num_buckets, after.num_buckets) == (4, 8)
    assert after.mean_history_length["clicks"] == 3


def test_buckets_grow_with_what_is_kept_of_their_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    write_day(root, 0, [[event(0, 1 + s % 3, s) for s in range(12)]])
    write_day(root, 1, [[event(1, 1, 60)]])
    run(make_recipe(root, user_buckets=1), DAYS[:1], None, tmp_path / "a")
    num_kept = sum(pq.read_table(path).num_rows for path in (tmp_path / "a" / "state").iterdir())
    monkeypatch.setattr(ingest_module, "ROWS_PER_BUCKET", num_kept)

    after = run(make_recipe(root, user_buckets=1), DAYS[1:2], tmp_path / "a", tmp_path / "b")

    assert after.num_buckets == 2


def test_counts_of_many_buckets_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets_module, "ROWS_PER_MERGE", 5)
    rng = np.random.default_rng(0)
    tables = [
        pa.table(
            {
                "item_id": rng.permutation(20)[:8],
                "events": rng.integers(1, 9, 8),
                "positives": rng.integers(0, 5, 8),
                "first_day": pa.array(rng.integers(0, 30, 8).astype(np.int32)).cast(pa.date32()),
            }
        )
        for _ in range(12)
    ]

    merged = merge_counts(tables, "item_id")

    whole = pa.concat_tables(tables).to_pandas().groupby("item_id", as_index=False)
    expected = whole.agg({"events": "sum", "positives": "sum", "first_day": "min"})
    assert merged.to_pylist() == expected.to_dict("records")


def test_artifact_of_a_later_day_cannot_be_continued(tmp_path: Path) -> None:
    recipe = make_recipe(small_root(tmp_path))
    run(recipe, DAYS[:2], None, tmp_path / "a")

    with pytest.raises(UserError, match=r"already holds events up to 2024-01-02"):
        run(recipe, DAYS[1:2], tmp_path / "a", tmp_path / "b")


def test_other_histories_cannot_be_continued(tmp_path: Path) -> None:
    recipe = make_recipe(small_root(tmp_path))
    run(recipe, DAYS[:1], None, tmp_path / "a")
    features = recipe.features
    longer = features.histories[0].model_copy(update={"max_length": 9})
    changed = features.model_copy(update={"histories": (longer, *features.histories[1:])})

    with pytest.raises(UserError, match=r"keeps other histories .* ingest again"):
        run(
            recipe.model_copy(update={"features": changed}),
            DAYS[1:2],
            tmp_path / "a",
            tmp_path / "b",
        )


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_files_do_not_depend_on_parallelism_and_errors_come_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small_root(tmp_path)
    recipe = make_recipe(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest_module, "stream_tasks", small_log.run_here)
        run(recipe, DAYS[:2], None, tmp_path / "serial")
    monkeypatch.setattr("pipeline.tasks.ROWS_PER_BUNDLE", 1)  # every task on its own
    run(recipe, DAYS[:2], None, tmp_path / "parallel")
    last = sorted((root / "events").rglob("*.parquet"))[-1]
    content = last.read_bytes()
    # The footer stays whole, so only the task that reads the pages can notice.
    last.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(UserError, match=f"{last} is not a complete Parquet file"):
        run(recipe, DAYS[:2], None, tmp_path / "damaged")

    assert file_bytes(tmp_path / "parallel") == file_bytes(tmp_path / "serial")

"""Join against a loop over events, one value at a time."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import small_log
from hypothesis import given
from hypothesis import strategies as st
from small_log import DAYS, Row, event, make_recipe, write_catalogue, write_day

from embedding.errors import UserError
from pipeline.config import Recipe
from pipeline.planning.id_use import FILE, read_uses
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join
from pipeline.samples.join_facts import JoinFacts, unknown_rows
from pipeline.samples.join_rows import gap_ids


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", small_log.run_here)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two days; item 2 and user 2 have nulls in every column."""
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (0, 1):
        rows = [
            event(
                day,
                1 + s % 3,
                s * s,
                item_id=1 + (s + day) % 4,
                device=None if s == 5 else f"device {s % 2}",
                price=None if s == 6 else float(s - 4),
                stars=None if s % 5 == 0 else s % 3,
                click=[0, 1, 1, None][s % 4],
                request_id=100 * day + s,
            )
            for s in range(16)
        ]
        write_day(root, day, [rows])
    return root


def run(recipe: Recipe, tmp_path: Path) -> tuple[list[Row], list[Row], JoinFacts]:
    """Ingested events, samples in the same order, and the facts."""
    for name in ("ingest", "join"):
        (tmp_path / name).mkdir()
    ingest(recipe, check_span(recipe, DAYS[:2], None), tmp_path / "ingest")
    facts = join(recipe, tmp_path / "ingest", tmp_path / "join")
    return (
        _rows(tmp_path / "ingest" / "events"),
        _rows(tmp_path / "join" / "samples"),
        facts,
    )


def _rows(folder: Path) -> list[Row]:
    paths = sorted(folder.glob("dt=*/*.parquet"))
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def raw_id(value: str | None) -> int:
    if value is None:
        return -1
    return int(pd.util.hash_array(np.array([value], object))[0]) % 2**63


def lookup(path: Path, key: str) -> dict[int, Row]:
    return {row[key]: row for row in pq.read_table(path).to_pylist()}


def expected_sample(row: Row, log: dict[int, Row], root: Path) -> Row:
    items, users = (lookup(root / f"{n}s.parquet", f"{n}_id") for n in ("item", "user"))
    item, user, raw = items[row["item_id"]], users.get(row["user_id"], {}), log[row["request_id"]]
    price, past = raw["price"], row["history:clicks:item_id"]
    gaps = [(row["timestamp"] - t) / 1000 for t in row["history:clicks:timestamp"]]
    return {
        **{f"key:{k}": row[k] for k in ("request_id", "user_id", "item_id", "timestamp")},
        "label:click": raw["click"],
        "sparse:user_id": row["user_id"],
        "sparse:item_id": row["item_id"],
        "sparse:category": raw_id(item["category"]),
        "sparse:tags": [-1] if item["tags"] is None else [raw_id(t) for t in item["tags"][:2]],
        "sparse:country": raw_id(user.get("country")),
        "sparse:device": raw_id(raw["device"]),
        "dense:price": 0.0
        if price is None
        else (math.copysign(math.log(1 + abs(price)), price) - 0.5) / 2,
        "dense:weight": -1.0 if item["weight"] is None else item["weight"],
        "sequence:past_item": past,
        "sequence:past_category": [raw_id(items[i]["category"]) for i in past],
        "sequence:past_stars": row["history:clicks:stars"],
        "sequence:past_gap": [int(1 + gap).bit_length() - 1 for gap in gaps],
        "sequence:seen_item": row["history:seen:item_id"],
    }


def raw_log(root: Path) -> dict[int, Row]:
    return {row["request_id"]: row for row in _rows(root / "events")}


@pytest.mark.parametrize("rows_per_group", [5, 65_536])
def test_samples_equal_a_loop_over_events(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_group: int
) -> None:
    # Small batches: the histories of a batch are then slices of longer arrays.
    monkeypatch.setattr(join_module, "ROWS_PER_GROUP", rows_per_group)

    events, samples, facts = run(make_recipe(root), tmp_path)

    assert len(samples) == len(events) == facts.rows == 32
    log = raw_log(root)
    for row, sample in zip(events, samples, strict=True):
        expected = expected_sample(row, log, root)
        assert sample.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("dense:"):
                assert sample[name] == pytest.approx(value, abs=1e-6)  # float32 against float64
            else:
                assert sample[name] == value, name


def test_facts_count_rows_and_history_lengths(root: Path, tmp_path: Path) -> None:
    events, _, facts = run(make_recipe(root), tmp_path)

    assert facts.rows_per_day == {DAYS[0]: 16, DAYS[1]: 16}
    for name in ("clicks", "seen"):
        lengths = [len(row[f"history:{name}:item_id"]) for row in events]
        assert facts.mean_sequence_length[name] == pytest.approx(np.mean(lengths))
    assert facts.unknown_users == 0


def test_ids_of_every_feature_are_counted(root: Path, tmp_path: Path) -> None:
    _, samples, facts = run(make_recipe(root), tmp_path)

    names = [name for name in samples[0] if name.startswith(("sparse:", "sequence:"))]
    assert set(facts.ids) == {name.split(":")[1] for name in names}
    found = read_uses(tmp_path / "join" / FILE, facts.ids)
    for name in names:
        values = [
            v for row in samples for v in (row[name] if type(row[name]) is list else [row[name]])
        ]
        counts = Counter(values)
        missing = counts.pop(-1, 0)
        use = found[name.split(":")[1]]
        assert dict(zip(use.ids.tolist(), use.id_lookups.tolist(), strict=True)) == counts
        assert (use.missing, use.lookups) == (missing, counts.total())
    assert not (tmp_path / "join" / "ids").exists()


def test_signed_hashes_are_ids_from_the_log_to_the_samples(root: Path, tmp_path: Path) -> None:
    for path in (root / "events").rglob("*.parquet"):
        table = pq.ParquetFile(path).read()
        users = pc.negate(table["user_id"])
        pq.write_table(table.set_column(1, "user_id", users), path)
    users = pq.read_table(root / "users.parquet")
    negative = users.set_column(0, "user_id", pc.negate(users["user_id"]))
    pq.write_table(negative, root / "users.parquet")

    _, samples, facts = run(make_recipe(root), tmp_path)

    assert facts.unknown_users == 0
    assert {row["sparse:user_id"] for row in samples} == {2**63 - user for user in (1, 2, 3)}
    assert facts.ids["user_id"].missing == 0


def test_column_types_follow_the_sample_contract(root: Path, tmp_path: Path) -> None:
    run(make_recipe(root), tmp_path)

    kinds = {"key": pa.int64(), "label": pa.float32(), "dense": pa.float32()}
    ids = pa.list_(pa.int64())
    for path in (tmp_path / "join").rglob("*.parquet"):
        for column in pq.read_schema(path):
            prefix = column.name.split(":")[0]
            if prefix == "sparse":
                assert column.type == (ids if column.name == "sparse:tags" else pa.int64())
            else:
                assert column.type == kinds.get(prefix, ids)


def test_user_that_left_the_catalogue_is_missing_and_counted(root: Path, tmp_path: Path) -> None:
    for name in ("ingest", "join"):
        (tmp_path / name).mkdir()
    recipe = make_recipe(root)
    ingest(recipe, check_span(recipe, DAYS[:2], None), tmp_path / "ingest")
    users = pq.read_table(root / "users.parquet")
    pq.write_table(users.slice(1), root / "users.parquet")  # user 1 is the first row

    facts = join(recipe, tmp_path / "ingest", tmp_path / "join")

    samples = _rows(tmp_path / "join" / "samples")
    gone = [row for row in samples if row["key:user_id"] == 1]
    assert facts.unknown_users == len(gone) > 0
    said = f"{len(gone)} of {facts.rows} rows lack the columns of their user"
    assert unknown_rows(recipe, facts) == [said]
    assert {row["sparse:country"] for row in gone} == {-1}


def without_item(root: Path, recipe: Recipe, tmp_path: Path, item: int) -> JoinFacts:
    """Join after an item has left the catalogue."""
    for name in ("ingest", "join"):
        (tmp_path / name).mkdir()
    ingest(recipe, check_span(recipe, DAYS[:2], None), tmp_path / "ingest")
    items = pq.read_table(root / "items.parquet")
    left = items.filter(pc.not_equal(items["item_id"], item))
    pq.write_table(left, root / "items.parquet")
    return join(recipe, tmp_path / "ingest", tmp_path / "join")


def test_items_that_left_the_catalogue_are_missing_and_counted(root: Path, tmp_path: Path) -> None:
    recipe = make_recipe(root)

    facts = without_item(root, recipe, tmp_path, 3)

    samples = _rows(tmp_path / "join" / "samples")
    gone = [row for row in samples if row["key:item_id"] == 3]
    assert facts.unknown_items == len(gone) > 0
    assert {row["sparse:category"] for row in gone} == {-1}
    past = [item for row in samples for item in row["sequence:past_item"]]
    assert facts.item_history_events == len(past), "histories that read no item column do not count"
    assert facts.unknown_history_items == past.count(3) > 0
    assert unknown_rows(recipe, facts) == [
        f"{len(gone)} of {len(samples)} rows lack the columns of their item",
        f"{past.count(3)} of {len(past)} past events lack the columns of their item",
    ]


@pytest.mark.parametrize(("limit", "what"), [(0.1, "rows"), (0.25, "past events")])
def test_more_items_outside_of_the_catalogue_than_allowed_are_refused(
    root: Path, tmp_path: Path, limit: float, what: str
) -> None:
    """Item 3: a quarter of the rows, and more of the clicks."""
    refusal = rf"\d+ of \d+ {what} are of items without a row in .*items.parquet.*={limit} allows"
    with pytest.raises(UserError, match=refusal):
        without_item(root, make_recipe(root, max_quarantined_share=limit), tmp_path, 3)


def test_recipes_without_item_columns_miss_nothing(root: Path, tmp_path: Path) -> None:
    recipe = make_recipe(root, max_quarantined_share=0.01)
    features = recipe.features
    own = features.model_copy(
        update={
            "sparse": tuple(
                f for f in features.sparse if f.column_name not in ("category", "tags")
            ),
            "dense": features.dense[:1],
            "sequences": tuple(f for f in features.sequences if f.name != "past_category"),
        }
    )
    recipe = recipe.model_copy(update={"features": own})

    facts = without_item(root, recipe, tmp_path, 3)

    assert facts.unknown_items > 0
    assert (facts.item_history_events, unknown_rows(recipe, facts)) == (0, [])


def test_a_catalogue_that_broke_after_ingest_is_not_joined(root: Path, tmp_path: Path) -> None:
    for name in ("ingest", "join"):
        (tmp_path / name).mkdir()
    recipe = make_recipe(root)
    ingest(recipe, check_span(recipe, DAYS[:2], None), tmp_path / "ingest")
    items = pq.read_table(root / "items.parquet")
    pq.write_table(pa.concat_tables([items, items.slice(1, 1)]), root / "items.parquet")

    with pytest.raises(UserError, match="item_id 2 has more than one row"):
        join(recipe, tmp_path / "ingest", tmp_path / "join")


def test_oracle_columns_are_carried_where_the_log_has_them(root: Path, tmp_path: Path) -> None:
    probabilities: dict[int, Any] = {}
    for path in (root / "events").rglob("*.parquet"):
        table = pq.ParquetFile(path).read()
        oracle = np.linspace(0, 1, table.num_rows, dtype=np.float32)
        probabilities |= dict(zip(table["request_id"].to_pylist(), oracle.tolist(), strict=True))
        pq.write_table(table.append_column("oracle_click", pa.array(oracle)), path)

    _, samples, _ = run(make_recipe(root), tmp_path)

    assert {row["key:request_id"]: row["oracle:click"] for row in samples} == probabilities


def test_row_weights_are_carried_and_those_that_are_none_quarantined(
    root: Path, tmp_path: Path
) -> None:
    given: dict[int, float | None] = {}
    values = [None, 0.0, 2.5, -1.0, math.nan, math.inf, 1e300, 1.0, 7.0]
    for path in (root / "events").rglob("*.parquet"):
        table = pq.ParquetFile(path).read()
        weights = [values[i % len(values)] for i in range(table.num_rows)]
        given |= dict(zip(table["request_id"].to_pylist(), weights, strict=True))
        pq.write_table(table.append_column("kept", pa.array(weights, pa.float64())), path)
    recipe = make_recipe(root, max_quarantined_share=0.5)
    (click,) = recipe.ranking.tasks
    weighted = click.model_copy(update={"sample_weight": "kept"})
    ranking = recipe.ranking.model_copy(update={"tasks": (weighted,)})

    _, samples, _ = run(recipe.model_copy(update={"ranking": ranking}), tmp_path)

    sound = {k: 1.0 if w is None else w for k, w in given.items() if w is None or 0 <= w < 10}
    assert {row["key:request_id"]: row["weight:click"] for row in samples} == sound
    parts = (tmp_path / "ingest" / "quarantine").glob("*.parquet")
    reasons = [reason for part in parts for reason in pq.read_table(part)["reason"].to_pylist()]
    assert len(reasons) == len(given) - len(sound)
    assert {*reasons} == {"weight kept not a number of 0 or more"}


@given(st.lists(st.integers(0, 10**12), min_size=1))
def test_gap_ids_are_whole_logarithms(gaps_ms: list[int]) -> None:
    found = gap_ids(np.array(gaps_ms, np.int64))

    for gap_ms, gap_id in zip(gaps_ms, found.tolist(), strict=True):
        # 2**id <= 1 + seconds < 2**(id + 1), in integers
        assert 2**gap_id * 1000 <= 1000 + gap_ms < 2 ** (gap_id + 1) * 1000

"""Rows of a request equal those that ingest and join make of the same events."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from deploy.serving.event_rows import EventForm, event_rows, together
from deploy.serving.wire import ScoreRequest
from embedding.errors import UserError
from embedding.raw_ids import hash_strings, to_raw_ids
from pipeline.codes.features import NearItems, codes_table
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.column_kinds import merged_kinds
from pipeline.samples.columns import ColumnKind
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join
from pipeline.samples.join_rows import FeatureSources, Places, join_events
from tests.pipeline import small_log
from tests.pipeline.small_log import DAYS, Row, event, make_recipe, write_catalogue, write_day

CODES = {
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"max_items": 9, "top_k": 1},
    "features": {"families": ["candidate", "history", "shared", "user"], "histories": ["clicks"]},
    "vectors": {"kind": "column"},
}
SHOWN = 4
"""Candidates of a request: events of one user at one time, which do not see each other."""


def log() -> list[Row]:
    """Requests of four items each; some values are null, and every price is another."""
    rows = []
    for request in range(12):
        for place in range(SHOWN):
            rows.append(
                event(
                    0,
                    1 + request % 3,
                    60 * request,
                    item_id=1 + (request + place) % 5,
                    device=None if request == 5 else f"device {request % 2}",
                    price=None if place == 3 else float(10 * request + place),
                    stars=None if place == 2 else 1 + place,
                    click=[1, 0, 1, None][(request + place) % 4],
                    request_id=request,
                )
            )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/`, `codes.parquet`, and `join/samples` of the log."""
    folder = tmp_path_factory.mktemp("log")
    write_catalogue(folder / "data", num_items=5)
    write_day(folder / "data", 0, [log()])
    ids = np.array([1, 3, 4, 5])  # item 2 has no codes
    codes = np.array([[0, 1], [0, 1], [0, 3], [2, 3]], np.int32)
    near = NearItems(np.array([0, 1, 2, -1]), np.array([[1], [0], [3], [2]], np.int32))
    pq.write_table(codes_table(ids, codes, near=near), folder / "codes.parquet")
    with pytest.MonkeyPatch.context() as patch:
        for module in (ingest_module, join_module):
            patch.setattr(module, "stream_tasks", small_log.run_here)
        for name in ("ingest", "join"):
            (folder / name).mkdir()
        checked = check_span(recipe_of(folder), DAYS[:1], None)
        facts = ingest(recipe_of(folder), checked, folder / "ingest")
        (folder / "facts.json").write_text(facts.model_dump_json())
        join(recipe_of(folder), folder / "ingest", folder / "join", codes=folder / "codes.parquet")
    return folder


def recipe_of(folder: Path) -> Recipe:
    data = make_recipe(folder / "data").model_dump(mode="json")
    return Recipe.model_validate({**data, "codes": CODES})


@pytest.fixture(scope="module")
def sources(folder: Path) -> FeatureSources:
    return FeatureSources.load(recipe_of(folder), folder / "codes.parquet")


@pytest.fixture(scope="module")
def form(folder: Path) -> EventForm:
    """As a bundle knows it: from what ingest read."""
    facts = json.loads((folder / "facts.json").read_text())
    kinds = {name: ColumnKind(**kind) for name, kind in facts["event_columns"].items()}
    return EventForm.of(recipe_of(folder), kinds)


def past(row: Row, clicked: bool) -> dict[str, list[Any]]:
    """All the user's earlier events, by a loop over the log."""
    earlier = [r for r in log() if r["user_id"] == row["user_id"]]
    earlier = [r for r in earlier if r["timestamp"] < row["timestamp"]]
    earlier = [r for r in earlier if r["click"] == 1 or not clicked]
    columns = ["item_id", "timestamp", *(["stars"] if clicked else [])]
    return {column: [r[column] for r in earlier] for column in columns}


def request_of(rows: list[Row], **changes: Any) -> ScoreRequest:
    first = rows[0]
    histories = {"clicks": past(first, clicked=True), "seen": past(first, clicked=False)}
    body = {
        "user_id": first["user_id"],
        "candidates": [row["item_id"] for row in rows],
        "timestamp": first["timestamp"],
        "context": {"device": first["device"]},
        "candidate_context": {"price": [row["price"] for row in rows]},
        "histories": histories,
    }
    return ScoreRequest.model_validate({**body, **changes})


def requests() -> list[list[Row]]:
    rows = log()
    return [rows[start : start + SHOWN] for start in range(0, len(rows), SHOWN)]


def test_samples_of_requests_equal_those_of_the_joined_log(
    folder: Path, sources: FeatureSources, form: EventForm
) -> None:
    events = together([event_rows(request_of(rows), form, now_ms=0) for rows in requests()])

    served = join_events(events, sources, Places.of(events, sources))

    paths = sorted((folder / "join" / "samples").glob("dt=*/*.parquet"))
    joined = [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]
    by_key = {tuple(row[f"key:{k}"] for k in ("request_id", "item_id")): row for row in joined}
    features = [name for name in joined[0] if name.split(":")[0] not in ("key", "label")]
    assert len(features) > 20
    compared = 0
    for row, sample in zip(
        [r for rows in requests() for r in rows], served.to_pylist(), strict=True
    ):
        expected = by_key[row["request_id"], row["item_id"]]
        assert {name: sample[name] for name in features} == {n: expected[n] for n in features}
        compared += 1
    assert compared == len(joined) == 48


def test_a_request_without_a_time_has_that_of_the_service(form: EventForm) -> None:
    rows = requests()[-1]
    now = rows[0]["timestamp"] - 60_000  # before some of the history

    events = event_rows(request_of(rows, timestamp=None), form, now_ms=now).spread()

    assert events["timestamp"].to_pylist() == [now] * SHOWN
    times = events["history:seen:timestamp"].to_pylist()[0]
    assert times == [t for t in past(rows[0], clicked=False)["timestamp"] if t < now][-2:]


def test_a_service_reads_no_event_that_training_would_not_have_seen_yet(folder: Path) -> None:
    recipe = recipe_of(folder)
    seen = next(h for h in recipe.features.histories if h.name == "seen")
    others = tuple(h for h in recipe.features.histories if h.name != "seen")
    delayed = (*others, seen.model_copy(update={"delay_s": 240}))
    features = recipe.features.model_copy(update={"histories": delayed})
    facts = json.loads((folder / "facts.json").read_text())
    kinds = {name: ColumnKind(**kind) for name, kind in facts["event_columns"].items()}
    late = EventForm.of(recipe.model_copy(update={"features": features}), kinds)
    rows = requests()[-1]
    now = rows[0]["timestamp"]

    events = event_rows(request_of(rows), late, now_ms=0).spread()

    known = past(rows[0], clicked=False)["timestamp"]
    times = events["history:seen:timestamp"].to_pylist()[0]
    assert times == [t for t in known if t + 240_000 < now][-2:] != known[-2:]


def test_lists_of_the_context_are_as_ingest_reads_them_and_no_longer_than_features(
    folder: Path,
) -> None:
    recipe = recipe_of(folder).model_dump(mode="json")
    sparse = {"name": "words", "table": "device", "max_length": 2}
    recipe["features"]["sparse"].append(sparse)
    kinds = {
        "user_id": ColumnKind(values="integer"),
        "item_id": ColumnKind(values="integer"),
        "device": ColumnKind(values="any"),
        "words": ColumnKind(values="string", is_list=True),
    }
    form = EventForm.of(Recipe.model_validate(recipe), kinds)
    given: list[Any] = [["a", "b", "c"], "a", None, [], ["c", None]]

    found = []
    for words in given:
        context = {"device": 7, "words": words}
        rows = event_rows(request_of(requests()[0], context=context), form, now_ms=0)
        found.append(rows.spread()["words"][0].as_py())

    raw = dict(zip("abc", hash_strings(pa.array(["a", "b", "c"])).tolist(), strict=True))
    assert found == [[raw["a"], raw["b"]], [raw["a"]], None, [], [raw["c"], None]]
    assert event_rows(
        request_of(requests()[0], context={"device": "x", "words": []}), form, now_ms=0
    ), "a column of nulls could be of any kind"


def test_files_of_nulls_tell_nothing_and_two_ways_to_write_an_id_are_refused(
    tmp_path: Path,
) -> None:
    nothing, names = ColumnKind(values="any"), ColumnKind(values="string", is_list=True)
    numbers = ColumnKind(values="integer")
    paths = [tmp_path / name for name in "abc"]

    def merged(*kinds: ColumnKind) -> dict[str, ColumnKind]:
        return merged_kinds((path, {"x": kind}) for path, kind in zip(paths, kinds, strict=True))

    assert merged(nothing, names, nothing) == {"x": names}
    with pytest.raises(UserError, match=f"strings in {paths[1]} and integers in {paths[2]}"):
        merged(nothing, names, numbers)


def test_a_bundle_that_does_not_know_its_log_is_not_served(folder: Path) -> None:
    with pytest.raises(UserError, match=r"\['user_id', 'item_id', 'device'\].*another --out"):
        EventForm.of(recipe_of(folder), {})


def test_rows_of_a_long_request_are_held_once(form: EventForm) -> None:
    """A history that every candidate shares must not take memory for each while it waits."""
    body = request_of(requests()[-1]).model_dump()
    body |= {"candidates": [1] * 10_000, "candidate_context": {"price": [1.0] * 10_000}}

    rows = event_rows(ScoreRequest.model_validate(body), form, now_ms=0)

    held = sum(column.nbytes for column in (*rows.own.values(), *rows.shared.values()))
    assert held < 10_000 * (8 + 4) + 2_000
    assert rows.spread().num_rows == len(rows) == 10_000


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["context"].pop("device"), "context lacks ['device']"),
        (lambda r: r["candidate_context"].pop("price"), "context lacks ['price']"),
        (lambda r: r["context"].update(colour=1), "context has ['colour'], which the model"),
        (lambda r: r["context"].update(price=1.0), "['price'] are in context and in candidate"),
        (lambda r: r["candidate_context"]["price"].pop(), "candidate_context.price has 3 values"),
        (lambda r: r["candidate_context"].update(price=["a"] * 4), "price: 'a' is no number"),
        (lambda r: r["candidate_context"].update(price=[10**400] * 4), "price: a value is too"),
        (lambda r: r["candidate_context"].update(price=[1e39] * 4), "is not finite as float32"),
        (lambda r: r["context"].update(device=1.5), "device: 1.5 is no string"),
        (lambda r: r["context"].update(device=7), "device: 7 is no string"),
        (lambda r: r["context"].update(device=["a"]), "device holds one id, and ['a'] is a list"),
        (lambda r: r["context"].update(device="\ud800"), "give integers of 64 bits, or strings"),
        (lambda r: r.update(user_id=2**64), "user_id: 18446744073709551616 has more than 64"),
        (lambda r: r.update(user_id=-(2**63) - 1), "user_id: -9223372036854775809 has more"),
        (lambda r: r.update(candidates=[1, 2, 3, True]), "candidates: ids are written in one way"),
        (lambda r: r.update(candidates=[True, 1, 2, 3]), "these in several: ['bool', 'int']"),
        (lambda r: r.update(candidates=[1, 2, 3, "4"]), "candidates: '4' is no integer"),
        (lambda r: r.update(user_id="1"), "user_id: '1' is no integer"),
        (lambda r: r["histories"].pop("seen"), "histories lacks ['seen']"),
        (lambda r: r["histories"]["clicks"].pop("stars"), "histories.clicks lacks ['stars']"),
        (
            lambda r: r["histories"]["clicks"]["stars"].append(1),
            "histories.clicks differ in length",
        ),
        (lambda r: r["histories"]["seen"]["item_id"].reverse(), None),
        (lambda r: r["histories"]["seen"]["timestamp"].reverse(), "seen is not ordered by time"),
        (
            lambda r: r["histories"]["seen"].update(item_id=["1"] * 12),
            "histories.seen.item_id: '1' is no integer",
        ),
        (
            lambda r: r["histories"]["seen"].update(item_id=[None] * 12),
            "histories.seen.item_id: None is no integer",
        ),
        (
            lambda r: r["histories"]["seen"].update(timestamp=[None] * 12),
            "histories.seen.timestamp: times are milliseconds since 1970",
        ),
        (
            lambda r: r["histories"]["seen"].update(timestamp=[2**70] * 12),
            "histories.seen.timestamp: times are milliseconds since 1970",
        ),
    ],
)
def test_a_request_that_does_not_suit_the_model_is_refused(
    form: EventForm, change: Change, message: str | None
) -> None:
    body = request_of(requests()[-1]).model_dump()
    change(body)
    request = ScoreRequest.model_validate(body)

    if message is None:
        event_rows(request, form, now_ms=0)
        return
    with pytest.raises(UserError) as refused:
        event_rows(request, form, now_ms=0)
    assert message in str(refused.value)


@pytest.mark.parametrize("mixed", [["a", 1], [1, "a"], [True, "a"], [None, "a", 2]])
def test_ids_of_a_column_of_which_nothing_is_known_are_written_in_one_way(
    folder: Path, mixed: list[Any]
) -> None:
    kinds = {name: ColumnKind(values="integer") for name in ("user_id", "item_id")}
    form = EventForm.of(recipe_of(folder), {**kinds, "device": ColumnKind(values="any")})
    rows = requests()[-1]
    body = request_of(rows).model_dump()
    del body["context"]["device"]
    body["candidates"] = [1] * len(mixed)
    body["candidate_context"] = {"device": mixed, "price": [1.0] * len(mixed)}

    with pytest.raises(UserError, match="device: ids are written in one way"):
        event_rows(ScoreRequest.model_validate(body), form, now_ms=0)


def test_integers_of_64_bits_are_the_ids_that_the_log_has_for_them(form: EventForm) -> None:
    signed = [-(2**63), -7, -1, 0, 5, 2**63 - 1]
    unsigned = [2**63, 2**63 + 9, 2**64 - 1]
    body = request_of(requests()[-1]).model_dump()
    body |= {"candidates": [*signed, *unsigned]}
    body["candidate_context"] = {"price": [1.0] * len(body["candidates"])}

    events = event_rows(ScoreRequest.model_validate(body), form, now_ms=0).spread()

    expected = [
        *to_raw_ids(pa.array(signed, pa.int64())),
        *to_raw_ids(pa.array(unsigned, pa.uint64())),
    ]
    assert events["item_id"].to_pylist() == [one.as_py() for one in expected]


def test_what_a_request_must_hold_is_told(form: EventForm) -> None:
    assert form.asked.model_dump() == {
        "user_id": "integer",
        "item_id": "integer",
        "context": {
            "device": {"values": "string", "is_list": False},
            "price": {"values": "number", "is_list": False},
        },
        "histories": {
            "clicks": {"item_id": "integer", "timestamp": "integer", "stars": "integer"},
            "seen": {"item_id": "integer", "timestamp": "integer"},
        },
    }


@pytest.mark.parametrize(
    "change",
    [{"timestamp": -1}, {"timestamp": 2**70}, {"candidates": []}, {"candidates": [1] * 10_001}],
)
def test_requests_are_bounded(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request_of(requests()[-1], **change)

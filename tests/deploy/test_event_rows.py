"""Rows of a request equal those that ingest and join make of the same events."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.serving.event_rows import EventForm, event_rows, together
from deploy.serving.wire import ScoreRequest
from embedding.errors import UserError
from pipeline.codes.features import NearItems, codes_table
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
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
        ingest(recipe_of(folder), check_span(recipe_of(folder), DAYS[:1], None), folder / "ingest")
        join(recipe_of(folder), folder / "ingest", folder / "join", codes=folder / "codes.parquet")
    return folder


def recipe_of(folder: Path) -> Recipe:
    data = make_recipe(folder / "data").model_dump(mode="json")
    return Recipe.model_validate({**data, "codes": CODES})


@pytest.fixture(scope="module")
def sources(folder: Path) -> FeatureSources:
    return FeatureSources.load(recipe_of(folder), folder / "codes.parquet")


@pytest.fixture(scope="module")
def form(sources: FeatureSources) -> EventForm:
    return EventForm.of(sources)


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

    events = event_rows(request_of(rows, timestamp=None), form, now_ms=now)

    assert events["timestamp"].to_pylist() == [now] * SHOWN
    times = events["history:seen:timestamp"].to_pylist()[0]
    assert times == [t for t in past(rows[0], clicked=False)["timestamp"] if t < now][-2:]


def test_a_column_that_is_a_list_in_one_request_is_one_in_all(form: EventForm) -> None:
    devices = ["phone", ["phone", "tablet"], None, []]
    events = together(
        [
            event_rows(request_of(requests()[0], context={"device": device}), form, now_ms=0)
            for device in devices
        ]
    )

    phone, both, nothing, empty = events["device"].to_pylist()[::SHOWN]
    assert phone == both[:1]
    assert len(both) == 2
    assert nothing is None
    assert empty == []


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["context"].pop("device"), "context lacks ['device']"),
        (lambda r: r["candidate_context"].pop("price"), "context lacks ['price']"),
        (lambda r: r["context"].update(colour=1), "context has ['colour'], which the model"),
        (lambda r: r["context"].update(price=1.0), "['price'] are in context and in candidate"),
        (lambda r: r["candidate_context"]["price"].pop(), "candidate_context.price has 3 values"),
        (lambda r: r["candidate_context"].update(price=["a"] * 4), "price: ['a', 'a', 'a', ...]"),
        (lambda r: r["candidate_context"].update(price=[1e39] * 4), "are not finite as float32"),
        (lambda r: r["context"].update(device=1.5), "device: [1.5] are no ids"),
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


def test_what_a_request_must_hold_is_told(form: EventForm) -> None:
    assert form.told().model_dump() == {
        "context": ["device", "price"],
        "histories": {
            "clicks": ["item_id", "timestamp", "stars"],
            "seen": ["item_id", "timestamp"],
        },
        "item_id": "integer",
        "user_id": "integer",
    }


def test_rows_are_those_of_one_event_a_candidate(form: EventForm) -> None:
    events = event_rows(request_of(requests()[-1]), form, now_ms=0)

    assert isinstance(events, pa.RecordBatch)
    assert events["item_id"].to_pylist() == [row["item_id"] for row in requests()[-1]]
    assert len(set(map(str, events["history:clicks:item_id"].to_pylist()))) == 1
    assert events["click"].null_count == len(events)

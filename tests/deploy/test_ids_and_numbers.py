"""A column that is read as ids and as numbers: samples, requests, and requests of the log."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.serving.event_rows import EventForm, event_rows, together
from deploy.serving.logged_requests import logged_requests
from deploy.serving.wire import ScoreRequest
from pipeline.config import Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join
from pipeline.samples.join_rows import FeatureSources, Places, join_events
from tests.pipeline import small_log
from tests.pipeline.small_log import DAYS, Row, event, make_recipe, write_catalogue, write_day

STARS = [-5, 0, None, 7, -(2**40)]
ROWS = [event(0, 1 + row % 2, row, stars=stars, click=0) for row, stars in enumerate(STARS)]


def recipe_of(root: Path) -> Recipe:
    """Reads `stars` as an id, as a number, and of past events."""
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["features"]["sparse"].append({"name": "stars_id", "table": "stars", "column": "stars"})
    recipe["features"]["dense"].append({"name": "level", "column": "stars", "missing": 9.0})
    return Recipe.model_validate(recipe)


@pytest.fixture
def form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EventForm:
    """What is asked of requests, and the data, ingested and joined."""
    root, ingested = tmp_path / "data", tmp_path / DAYS[0] / "ingest"
    write_catalogue(root)
    write_day(root, 0, [ROWS])
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", small_log.run_here)
    ingested.mkdir(parents=True)
    (tmp_path / "join").mkdir()
    facts = ingest(recipe_of(root), check_span(recipe_of(root), DAYS[:1], None), ingested)
    join(recipe_of(root), ingested, tmp_path / "join")
    return EventForm.of(recipe_of(root), facts.event_columns)


def expected(stars: int | None) -> tuple[float, int]:
    """The number, and the raw id: 63 bits of the integer."""
    return (9.0, -1) if stars is None else (float(stars), stars % 2**63)


def request_of(row: Row) -> ScoreRequest:
    body = {name: row[name] for name in ("user_id", "timestamp")}
    context = {name: row[name] for name in ("device", "price", "stars")}
    histories = {
        "clicks": {"item_id": [], "timestamp": [], "stars": []},
        "seen": {"item_id": [], "timestamp": []},
    }
    body |= {"candidates": [row["item_id"]], "context": context, "histories": histories}
    return ScoreRequest.model_validate(body)


def pairs(samples: pa.Table) -> list[tuple[float, int]]:
    columns = (samples[name].to_pylist() for name in ("dense:level", "sparse:stars_id"))
    return list(zip(*columns, strict=True))


def test_numbers_of_samples_and_of_requests_are_those_of_the_log(
    tmp_path: Path, form: EventForm
) -> None:
    wanted = [expected(stars) for stars in STARS]
    paths = sorted((tmp_path / "join" / "samples").rglob("*.parquet"))
    samples = pa.concat_tables([pq.ParquetFile(path).read() for path in paths])
    assert pairs(samples.sort_by("key:request_id")) == wanted

    sources = FeatureSources.load(recipe_of(tmp_path / "data"))
    events = together([event_rows(request_of(row), form, now_ms=0) for row in ROWS])
    assert pairs(join_events(events, sources, Places.of(events, sources))) == wanted


def test_candidates_may_differ_in_such_a_column(form: EventForm) -> None:
    body = request_of(ROWS[0]).model_dump()
    stars = body["context"].pop("stars")
    body |= {"candidates": [1, 2], "candidate_context": {"stars": [stars, 7]}}

    events = event_rows(ScoreRequest.model_validate(body), form, now_ms=0).spread()

    assert events["number:stars"].to_pylist() == [-5.0, 7.0]
    assert events["stars"].to_pylist() == [2**63 - 5, 7]


def test_requests_of_the_log_ask_with_its_own_numbers(tmp_path: Path, form: EventForm) -> None:
    found = logged_requests(tmp_path, tmp_path / "data", form.asked, number=40, candidates=1)

    assert {request.context["stars"] for request in found} == set(STARS)

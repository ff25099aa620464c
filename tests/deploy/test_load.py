"""A load test counts what came back, and sends what callers of the logged events would have."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from deploy.app import main
from deploy.serving.load import LoadFigures, LoadPlan, ask_all
from deploy.serving.logged_requests import logged_requests
from deploy.serving.wire import ContextForm, RequestForm
from embedding.errors import UserError
from embedding.raw_ids import hash_strings
from tests.deploy.refusal import refused

pytestmark = pytest.mark.integration

ANSWER_S = 0.05


@asynccontextmanager
async def answering(statuses: list[int], at_once: int = 1) -> AsyncIterator[str]:
    """A service whose answers take `ANSWER_S`, so many at once; its url."""
    alone = asyncio.Semaphore(at_once)
    asked = 0

    async def answer(_: web.Request) -> web.Response:
        nonlocal asked
        async with alone:
            await asyncio.sleep(ANSWER_S)
        status = statuses[asked % len(statuses)]
        asked += 1
        return web.json_response({"model": {"date": "2024-01-01"}}, status=status)

    app = web.Application()
    app.router.add_post("/score", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def figures_of(plan: LoadPlan, statuses: list[int], at_once: int = 1) -> LoadFigures:
    async def run() -> LoadFigures:
        async with answering(statuses, at_once) as url:
            return await ask_all(url, [b"{}"], plan)

    return asyncio.run(run())


def test_a_closed_loop_asks_as_fast_as_it_is_answered() -> None:
    found = figures_of(LoadPlan(seconds=1.0, concurrency=2, candidates=7), [200])

    assert found.statuses == {"200": found.requests}
    assert found.models == {"2024-01-01": found.requests}
    assert 5 <= found.requests <= 1 / ANSWER_S + 2
    assert found.candidates_per_s == pytest.approx(7 * found.requests_per_s)
    # Two callers, served one after the other: each waits for the other one, too.
    assert 1.5 * 1000 * ANSWER_S < found.p50_ms <= found.p95_ms <= found.p99_ms <= found.max_ms


def test_an_open_loop_counts_the_time_that_requests_waited_to_be_sent() -> None:
    """Twice what the service can do: half the requests wait a second at the end."""
    rate = 2 / ANSWER_S
    found = figures_of(LoadPlan(seconds=1.0, concurrency=4, rate=rate), [200])

    assert found.requests == rate
    assert found.max_ms > 700
    assert found.requests_per_s < rate


def test_requests_of_an_open_loop_do_not_wait_for_one_another_here() -> None:
    """Ten are under way at a time, whatever a closed loop would have been given."""
    plan = LoadPlan(seconds=1.0, concurrency=1, rate=10 / ANSWER_S)
    found = figures_of(plan, [200], at_once=1000)

    assert found.requests == plan.rate
    assert found.p50_ms < 5 * 1000 * ANSWER_S, "over one connection, half would wait for seconds"


def test_what_is_refused_is_counted_beside_the_times() -> None:
    found = figures_of(LoadPlan(seconds=0.5, concurrency=1), [200, 200, 503])

    assert found.statuses["503"] > 0
    assert found.requests_per_s * found.seconds == pytest.approx(found.statuses["200"])
    assert found.failed_share == pytest.approx(found.statuses["503"] / found.requests)
    assert found.p50_ms >= 1000 * ANSWER_S


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "5", "--concurrency", "8"], "--concurrency would change nothing"),
        (["--url", "http://a", "--replicas", "2"], "--replicas is of a service that this"),
        (["--url", "http://a", "--cpus-per-replica", "1"], "--cpus-per-replica is of a service"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    command = ["bench", "serve", "--out", str(tmp_path), *options]

    assert message in refused(capsys, main(command))


def test_a_service_that_refuses_the_logged_requests_is_not_measured() -> None:
    with pytest.raises(UserError, match="does not answer requests of the log"):
        figures_of(LoadPlan(seconds=0.5), [422])


def test_nothing_that_listens_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "serve", "--out", str(tmp_path), "--url", "http://127.0.0.1:1/"]

    assert "is no service of Braid" in refused(capsys, main(command))


def test_a_service_of_its_own_is_not_started_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    said = refused(capsys, main(["bench", "serve", "--out", str(tmp_path)]))

    assert "name a running service with --url" in said


def test_requests_are_those_of_ingested_events_with_the_ids_of_the_catalogue(
    tmp_path: Path,
) -> None:
    names = pa.array(["shoe", "hat", "coat"])
    raw = hash_strings(names).tolist()
    pq.write_table(pa.table({"item_id": names}), tmp_path / "items.parquet")
    folder = tmp_path / "runs" / "2024-01-02" / "ingest" / "events" / "dt=2024-01-02"
    folder.mkdir(parents=True)
    events = {
        "user_id": hash_strings(pa.array(["ann", "bob"])),
        "timestamp": [1000, 2000],
        "device": pa.array([hash_strings(pa.array(["phone"]))[0], None], pa.int64()),
        "price": pa.array([-1.0, None], pa.float32()),
        "history:clicks:item_id": [[raw[1], raw[2]], []],
        "history:clicks:stars": [[3, -1], []],
    }
    pq.write_table(pa.table(events), folder / "bucket-0000.parquet")
    log = tmp_path / "events" / "dt=2024-01-02"
    log.mkdir(parents=True)
    for i, device in enumerate(["tablet", "phone"]):
        pq.write_table(pa.table({"device": [device, None]}), log / f"part-{i}.parquet")
    pq.write_table(pa.table({"user_id": ["bob", "ann"]}), tmp_path / "users.parquet")
    form = RequestForm(
        user_id="string",
        item_id="string",
        context={"device": ContextForm(values="string"), "price": ContextForm(values="number")},
        histories={"clicks": {"item_id": "string", "stars": "integer"}},
    )

    requests = logged_requests(tmp_path / "runs", tmp_path, form, number=40, candidates=5)

    by_user = {request.user_id: request for request in requests}
    assert sorted(by_user) == ["ann", "bob"]
    assert by_user["ann"].context == {"device": "phone", "price": -1.0}
    assert by_user["ann"].histories == {"clicks": {"item_id": ["hat", "coat"], "stars": [3, None]}}
    assert by_user["bob"].context == {"device": None, "price": None}
    assert {len(request.candidates) for request in requests} == {5}
    assert {item for request in requests for item in request.candidates} == set(names.to_pylist())
    assert json.loads(by_user["ann"].model_dump_json())["timestamp"] == 1000
    wider = form.model_copy(update={"context": {"hour": ContextForm(values="any")}})
    with pytest.raises(UserError, match=r"lacks \['hour'\]"):
        logged_requests(tmp_path / "runs", tmp_path, wider, number=1, candidates=1)
    (tmp_path / "users.parquet").unlink()
    with pytest.raises(UserError, match="nobody can be asked about"):
        logged_requests(tmp_path / "runs", tmp_path, form, number=1, candidates=1)

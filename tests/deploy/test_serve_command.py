"""`braid serve` on a cluster: the room it waits for, what it ends, and what it says."""

from typing import Any

import pytest

from deploy.serving import run
from deploy.serving.ownership import Seen, is_own
from deploy.serving.run import TERMS, Address, running
from deploy.serving.service import ServiceConfig
from deploy.serving.state_lines import StateLines
from deploy.serving.wire import RequestForm, ServedModel, ServiceState
from embedding.errors import UserError
from pipeline.cluster import lacking_resources
from pipeline.config import ClusterConfig

FORM = RequestForm(user_id="integer", item_id="integer", context={}, histories={})


def state(replica: str, day: int, error: str | None = None, artifact: str = "") -> ServiceState:
    model = ServedModel(
        date=f"2024-01-0{day}", artifact_id=artifact or f"id-{day}", bundle=f"models/{day}"
    )
    return ServiceState(
        replica=replica, model=model, tasks=[], request=FORM, loaded_at="", last_error=error
    )


def seen(*tokens: str, running: int | None = None, deploying: bool = False) -> Seen:
    return Seen(frozenset(tokens), len(tokens) if running is None else running, deploying)


@pytest.mark.parametrize(
    ("found", "has_started", "expected"),
    [
        (seen("own"), True, True),
        (seen(running=1), True, True),  # it hangs
        (seen("other"), True, False),
        (seen("own", "other"), True, False),
        (seen("own", deploying=True), True, False),  # somebody has begun to replace it
        (seen(), False, True),  # none of its replicas came up
        (seen("own"), False, True),
        (seen("before"), False, False),  # it was to be replaced, and goes on
        (seen("", running=1), False, False),  # deployed by another tool
        (seen(running=1), False, False),
    ],
)
def test_an_application_is_ended_by_whoever_started_it(
    found: Seen, has_started: bool, expected: bool
) -> None:
    assert is_own(found, "own", has_started=has_started) is expected


class Session:
    """Stands for Ray's."""

    waited: list[list[dict[str, float]]]

    def __init__(self, cluster: ClusterConfig, **_: Any) -> None:
        self.cluster = cluster
        Session.waited = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> None: ...

    def group(self) -> list[dict[str, float]]:
        return [{"CPU": self.cluster.cpus_per_worker}] * self.cluster.num_workers

    def wait_for(self, _: str, bundles: list[dict[str, float]]) -> None:
        Session.waited.append(bundles)


class EndedError(Exception):
    pass


def start(monkeypatch: pytest.MonkeyPatch, *, held: int | None, replace: bool) -> None:
    def stop(*_: object) -> bool:
        raise EndedError

    monkeypatch.setattr(run, "RaySession", Session)
    monkeypatch.setattr(run, "running_replicas", lambda _: held)
    monkeypatch.setattr(run, "_listen", stop)
    config = ServiceConfig.model_validate({"out": "runs", "replicas": 3})
    with running(config, Address(), lambda _: None, replace=replace):
        pass


def test_a_name_that_is_taken_is_refused_before_room_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Status:
        applications = {"braid": type("Application", (), {"status": "RUNNING"})}

    monkeypatch.setattr("ray.serve.status", Status)

    with pytest.raises(UserError, match="has an application 'braid' .RUNNING.; --replace takes"):
        start(monkeypatch, held=2, replace=False)

    assert Session.waited == []


@pytest.mark.parametrize(("held", "asked"), [(None, 3), (0, 3), (2, 1), (5, 0)])
def test_a_replacement_waits_for_no_more_room_than_what_it_replaces_lacks(
    monkeypatch: pytest.MonkeyPatch, held: int | None, asked: int
) -> None:
    with pytest.raises(EndedError):
        start(monkeypatch, held=held, replace=True)

    assert Session.waited == [[{"CPU": 1.0}] * asked]


def test_a_cluster_that_is_too_small_is_told_in_the_options_of_serve() -> None:
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=4)

    assert lacking_resources([{"CPU": 0.0}], cluster, terms=TERMS) == (
        "--replicas=2 x --cpus-per-replica=4 needs 8 CPUs and the cluster has 0"
    )


def test_every_change_of_a_replica_is_said_once() -> None:
    lines = StateLines("http://here:8000", num_replicas=1)

    first = lines.of(state("a", 1))
    assert first == (
        "serves the model of 2024-01-01 (id-1) at http://here:8000/score "
        "(what it asks for: http://here:8000/docs)"
    )
    assert lines.of(state("a", 1)) is None
    assert (lines.of(state("a", 1, "no file")) or "") == (
        "still serves the model of 2024-01-01 (id-1): no file"
    )
    assert lines.of(state("a", 1)) == first, "the error is over"
    assert "of 2024-01-02 (id-2)" in (lines.of(state("a", 2)) or "")
    assert "of 2024-01-02 (again)" in (lines.of(state("a", 2, artifact="again")) or "")
    assert lines.of(state("a", 1)) == first, "a rollback"
    assert lines.of_silence("killed") == "no replica answers: killed"
    assert lines.of_silence("killed") is None
    assert lines.of(state("a", 1)) == first, "it answers again"
    assert lines.of_silence("killed") == "no replica answers: killed"


def test_replicas_that_differ_are_told_apart() -> None:
    lines = StateLines("http://here:8000", num_replicas=2)

    said = [lines.of(state(replica, day)) for replica, day in [("a", 1), ("b", 1), ("a", 2)]]
    again = [lines.of(state(replica, day)) for replica, day in [("b", 1), ("a", 2), ("b", 1)]]

    assert [line and line.split(" (")[0] for line in said] == [
        "replica a: serves the model of 2024-01-01",
        "replica b: serves the model of 2024-01-01",
        "replica a: serves the model of 2024-01-02",
    ]
    assert again == [None] * 3


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000"), ("a", "http://a:8000")],
)
def test_the_url_of_a_service_is_one(host: str, url: str) -> None:
    assert Address(host=host).url == url

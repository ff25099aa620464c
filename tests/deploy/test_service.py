"""`braid serve` as its users start it: over HTTP, while models change, until it is ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.app import main
from deploy.serving.batches import Asked, score_together
from deploy.serving.live_model import LiveModel, ModelSource
from deploy.serving.load import LoadFigures
from deploy.serving.wire import ScoreRequest
from pipeline.registry import require_production, rollback
from tests.deploy.served import ingested, publish_days, request_of
from tests.pipeline.small_log import DAYS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
START_S = 120


class Service:
    """A `braid serve` process."""

    def __init__(self, out: Path, port: int) -> None:
        command = ["serve", "--out", str(out), "--port", str(port), "--poll-s", "0.5"]
        program = "import sys; from deploy.app import main; sys.exit(main())"
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=out.parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> None:
        """Until a line has the text."""
        until = time.monotonic() + START_S
        while not any(text in line for line in self.lines):
            assert time.monotonic() < until, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.1)

    def ask(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer of a request."""
        request = urllib.request.Request(
            f"{self.url}/score", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return publish_days(tmp_path)


@pytest.fixture
def service(out: Path) -> Iterator[Service]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(out, port)
    yield service
    if service.process.poll() is None:
        service.process.kill()
        service.process.wait(60)


def probabilities(out: Path, body: dict[str, Any]) -> list[float]:
    """What the model in production says, in this process."""
    live = LiveModel(ModelSource(out=out))
    rows = live.now.scorer.rows(ScoreRequest.model_validate(body), now_ms=0)
    (scores,) = score_together([Asked(live.now, rows)])
    assert not isinstance(scores, Exception)
    return scores.probs_BT[:, 0].tolist()


def test_requests_are_answered_by_what_is_in_production_until_the_service_is_ended(
    out: Path, service: Service
) -> None:
    body = request_of(ingested(out)[7], [1, 2, 3, 4, 50])
    newer = probabilities(out, body)
    answering = require_production(out).manifest.artifact_id
    service.wait_for(f"serves the model of {DAYS[1]} ({answering}) at {service.url}/score")

    status, answer = service.ask(body)

    assert status == 200
    assert answer["candidates"] == body["candidates"]
    assert answer["model"]["date"] == DAYS[1]
    assert (answer["unknown_candidates"], answer["unknown_user"]) == (1, False)
    torch.testing.assert_close(
        torch.tensor(answer["probabilities"]["click"]), torch.tensor(newer), atol=1e-6, rtol=0
    )
    status, refusal = service.ask({**body, "context": {}})
    assert (status, "context lacks ['device', 'price']" in refusal["detail"]) == (422, True)
    status, refusal = service.ask({"user_id": 1})
    assert (status, refusal["detail"]) == (422, "candidates: Field required")
    figures = out.parent / "figures.json"
    bench = ["bench", "serve", "--out", str(out), "--url", service.url, "--seconds", "1"]
    assert main([*bench, "--candidates", "3", "--json", str(figures)]) == 0
    measured = LoadFigures.model_validate_json(figures.read_text())
    assert measured.statuses == {"200": measured.requests}
    assert measured.models == {DAYS[1]: measured.requests}

    answers: list[tuple[int, Any]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(service.ask(body))

    askers = [threading.Thread(target=keep_asking) for _ in range(4)]
    for asker in askers:
        asker.start()
    rollback(out)
    older = probabilities(out, body)
    service.wait_for(f"serves the model of {DAYS[0]} (")
    time.sleep(0.5)
    stop.set()
    for asker in askers:
        asker.join()

    assert {status for status, _ in answers} == {200}
    by_model = {DAYS[0]: older, DAYS[1]: newer}
    assert {answer["model"]["date"] for _, answer in answers} == set(by_model)
    for _, answer in answers:
        torch.testing.assert_close(
            torch.tensor(answer["probabilities"]["click"]),
            torch.tensor(by_model[answer["model"]["date"]]),
            atol=1e-6,
            rtol=0,
        )

    assert service.end(signal.SIGTERM) == 130
    assert not [line for line in service.lines if "Traceback" in line or "rror" in line]

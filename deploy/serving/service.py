"""The Ray Serve application: replicas that score requests with the model in production.

    POST /score   `wire.ScoreRequest` -> `wire.ScoreResponse`
    GET  /model   `wire.ServiceState`: what is served, and what a request must hold
    GET  /docs    the same for people, and forms to try it

`braid serve` runs it; a Serve config file names it as `deploy.serving.service:build`, with the
fields of `ServiceConfig` as args.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from ray.util.metrics import Counter, Gauge, Histogram

from deploy.serving.batches import Asked, Batcher, Outcome, score_together
from deploy.serving.live_model import LiveModel, ModelSource
from deploy.serving.scorer import Scores
from deploy.serving.wire import ScoreRequest, ScoreResponse, ServiceState
from embedding.errors import UserError

MAX_UNDER_WAY = 64
"""Requests of a replica that are being read, wait for their batch, or are scored."""
_MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_ERRORS_TOLD = 3


class ServiceConfig(ModelSource):
    """A service: what it serves, and with how much."""

    replicas: PositiveInt = 1
    """Processes, each with the whole model."""
    cpus_per_replica: PositiveFloat = 1
    poll_s: PositiveFloat = 10
    """Between two looks at what is in production."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests that wait at a proxy because all replicas are busy; more are refused at once, with
    status 503."""
    token: str = ""
    """Of the command that starts it: it ends no other's."""


class RefreshFigures:
    """What alarms look at: whether the newest model and catalogue are served."""

    def __init__(self) -> None:
        self._model_s = Gauge(
            "braid_serve_model_day_seconds",
            "Unix time of the day that the served model was trained up to; none of a named bundle.",
        )
        self._refreshed_s = Gauge(
            "braid_serve_refreshed_seconds",
            "Unix time of the last look after which all that is new was served.",
        )
        self._failures = Counter(
            "braid_serve_failed_refreshes", "Models and catalogues that could not be loaded."
        )
        self._num_told = 0

    def tell(self, live: LiveModel) -> None:
        """After each look at what is new."""
        day = live.now.model.date
        if day is not None:
            self._model_s.set(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
        self._refreshed_s.set(live.refreshed_s)
        if live.num_failures > self._num_told:  # a counter refuses 0
            self._failures.inc(live.num_failures - self._num_told)
            self._num_told = live.num_failures


http = FastAPI(title="Braid", description="Scores candidates with the model in production.")


@http.exception_handler(UserError)
async def _refuse(_: Request, error: UserError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=422)


@http.exception_handler(RequestValidationError)
async def _refuse_malformed(_: Request, error: RequestValidationError) -> JSONResponse:
    """The first faults, without the request that they are of: it can be megabytes."""
    told = [
        f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}"
        for fault in error.errors()[:_ERRORS_TOLD]
    ]
    return JSONResponse({"detail": "; ".join(told)}, status_code=422)


@serve.deployment
@serve.ingress(http)
class ScoringService:
    """One replica."""

    def __init__(self, config: ServiceConfig) -> None:
        """Load what is in production, and watch it.

        Raises:
            UserError: there is none, or it cannot be used.
        """
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
        self._token = config.token
        self._live = LiveModel(config)
        self._batcher = Batcher(self._score)
        self._candidates = Counter("braid_serve_candidates", "Candidates scored.")
        self._unknown = Counter(
            "braid_serve_unknown_candidates", "Candidates without a row in items.parquet."
        )
        self._without_codes = Counter(
            "braid_serve_candidates_without_codes",
            "Candidates that came after the codes of the model.",
        )
        self._batch_ms = Histogram(
            "braid_serve_batch_ms", "Milliseconds of a batch.", boundaries=list(_MILLISECONDS)
        )
        self._figures = RefreshFigures()
        self._figures.tell(self._live)
        self._live.watch(config.poll_s, lambda: self._figures.tell(self._live))

    @http.post("/score", response_model=ScoreResponse)
    async def score(self, request: ScoreRequest) -> Response:
        """Probabilities of every task for every candidate, in their order."""
        loaded = self._live.now
        rows = loaded.scorer.rows(request, time.time_ns() // 1_000_000)
        scores = await self._batcher.scores(Asked(loaded, rows))
        columns = scores.probs_BT.T.tolist()
        answer = ScoreResponse(
            model=loaded.model,
            candidates=request.candidates,
            probabilities=dict(zip(loaded.scorer.tasks, columns, strict=True)),
            unknown_candidates=scores.unknown_candidates,
            unknown_user=scores.unknown_user,
            candidates_without_codes=scores.candidates_without_codes,
        )
        # Written here: FastAPI would check the answer, copy it, and write it in Python.
        return Response(answer.model_dump_json(), media_type="application/json")

    @http.get("/model")
    def model(self) -> ServiceState:
        """What is served, and what a request must hold."""
        replica = serve.get_replica_context().replica_id.unique_id
        return self._live.state.model_copy(update={"replica": replica, "token": self._token})

    async def check_health(self) -> None:
        """Serve asks for it, and starts a replica that raises anew.

        Raises:
            RuntimeError: it scores nothing any more.
        """
        fault = self._batcher.health.fault
        if fault is not None:
            raise RuntimeError(f"{fault}; the replica is started anew")

    def _score(self, asked: Sequence[Asked]) -> list[Outcome]:
        started = time.perf_counter()
        found = score_together(asked)
        scored = [one for one in found if isinstance(one, Scores)]
        for counter, count in (
            (self._candidates, sum(len(one.probs_BT) for one in scored)),
            (self._unknown, sum(one.unknown_candidates for one in scored)),
            (self._without_codes, sum(one.candidates_without_codes for one in scored)),
        ):
            if count:  # a counter refuses 0
                counter.inc(count)
        self._batch_ms.observe(1000 * (time.perf_counter() - started))
        return found

    def __del__(self) -> None:
        live = getattr(self, "_live", None)
        if live is not None:
            live.close()


def build(config: ServiceConfig) -> Application:
    """The application, for Ray Serve."""
    service: serve.Deployment = ScoringService  # the decorator makes it one
    deployment = service.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica},
        max_ongoing_requests=MAX_UNDER_WAY,
        max_queued_requests=config.max_waiting,
    )
    return deployment.bind(config)

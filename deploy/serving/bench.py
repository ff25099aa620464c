"""`braid bench serve`: a running service, or one of its own, asked about a day's events."""

import asyncio
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

from pydantic import ValidationError

from deploy.bundle import describe
from deploy.serving.load import LoadFigures, LoadPlan, ask_all
from deploy.serving.logged_requests import logged_requests
from deploy.serving.run import Address, check, running
from deploy.serving.service import ServiceConfig
from deploy.serving.wire import ServiceState
from embedding.errors import UserError
from pipeline.cluster import cluster_address

_REQUESTS = 512
"""Different ones, asked in turn."""


def measure(url: str, out: Path, data_root: Path | None, plan: LoadPlan) -> LoadFigures:
    """Ask a running service.

    Args:
        url: in front of /score.
        out: output directory whose ingested events are asked about.
        data_root: directory of items.parquet and users.parquet; None: as the bundle says.
        plan: how.

    Raises:
        UserError: nothing answers there, or `out` does not suit what is served.
    """
    state = _state(url)
    if data_root is None:
        data_root = describe(Path(state.model.bundle)).recipe.data.root
    requests = logged_requests(
        out, data_root, state.request, number=_REQUESTS, candidates=plan.candidates
    )
    bodies = [request.model_dump_json().encode() for request in requests]
    return asyncio.run(ask_all(url, bodies, plan))


def measure_own(config: ServiceConfig, plan: LoadPlan) -> LoadFigures:
    """Start a service on this machine, ask it, and end it.

    Raises:
        UserError: it cannot be started.
    """
    if cluster_address() is not None:  # whose Serve may listen anywhere
        raise UserError(
            "with RAY_ADDRESS set, name a running service with --url; without it, one is started "
            "on this machine"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = Address(port=probe.getsockname()[1], name="braid-bench", route="/braid-bench")
    check(config, address)
    assert config.out is not None
    with running(config, address, lambda _: None):
        return measure(address.url, config.out, config.data, plan)


def _state(url: str) -> ServiceState:
    try:
        with urllib.request.urlopen(f"{url}/model", timeout=60) as answer:
            return ServiceState.model_validate(json.load(answer))
    except (urllib.error.URLError, ValidationError, ValueError) as error:
        raise UserError(
            f"--url {url} is no service of Braid ({error}); start one with `braid serve`, and name "
            "what is in front of its /score"
        ) from error

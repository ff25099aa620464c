"""`braid serve`: the application on Ray, until it is interrupted."""

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from deploy.bundle import describe
from deploy.serving.service import ServiceConfig, build
from deploy.serving.wire import ServedModel, ServiceState
from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.cluster import RaySession, cluster_address
from pipeline.config import ClusterConfig
from pipeline.failures import last_line
from pipeline.samples.catalogue import check_catalogue

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LOOK_S = 2.0
"""Between two looks at what the service serves."""
ANSWER_S = 60.0
"""Until a replica must have said what it serves."""


class Address(StrictConfig):
    """Where a service listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    route: str = "/"
    name: str = "braid"
    """Of the application on its cluster."""

    @property
    def url(self) -> str:
        """Of the endpoints."""
        return f"http://{self.host}:{self.port}{self.route.rstrip('/')}"


def check(config: ServiceConfig, address: Address) -> ServedModel:
    """What can be said before Ray starts.

    Returns:
        What is going to be served.

    Raises:
        UserError: no model is there, its catalogue does not suit it, or the port is in use.
    """
    model = config.current()
    bundle = describe(Path(model.bundle))
    root = config.data or bundle.recipe.data.root
    if not (root / "items.parquet").is_file():
        raise UserError(
            f"{root / 'items.parquet'} does not exist, and candidates have their columns from it; "
            "name the directory of items.parquet and users.parquet with --data"
        )
    check_catalogue(root, bundle.recipe.features)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise UserError(
                f"--host {address.host} --port {address.port} cannot be listened on: "
                f"{error.strerror}; choose another port, or end what uses it"
            ) from error
    return model


@contextmanager
def running(config: ServiceConfig, address: Address) -> Iterator[Callable[[], ServiceState]]:
    """The service while the block runs; yields what asks a replica for its state.

    Raises:
        UserError: the cluster has no room, has such an application, or a replica refuses to start.
    """
    from ray import serve

    cluster = ClusterConfig(num_workers=config.replicas, cpus_per_worker=config.cpus_per_replica)
    for name in ("ray", "ray.serve"):  # replicas log to files of their own
        logging.getLogger(name).setLevel(logging.WARNING)
    with RaySession(cluster) as session:
        session.wait_for("serve", session.group())
        serve.start(http_options={"host": address.host, "port": address.port})
        taken = serve.status().applications.get(address.name)
        if taken is not None:
            raise UserError(
                f"the cluster has an application {address.name!r} ({taken.status}); choose another "
                "--name and --route, or end that one"
            )
        try:
            handle = _started(config, address)
            yield lambda: handle.model.remote().result(timeout_s=ANSWER_S)
        finally:
            serve.delete(address.name)
            if cluster_address() is not None and not serve.status().applications:
                serve.shutdown()  # a local Ray ends with the command


def _started(config: ServiceConfig, address: Address) -> "DeploymentHandle":
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.run(build(config), name=address.name, route_prefix=address.route)
    except (RuntimeError, RayServeException) as error:
        told = serve.status().applications.get(address.name)
        raise UserError(
            f"the service could not start: {last_line(error)} {told.message if told else ''}"
        ) from error


def serve_until_ended(config: ServiceConfig, address: Address, say: Callable[[str], None]) -> None:
    """Serve, and tell when another model is served; SIGTERM and SIGINT end it."""
    with running(config, address) as state:
        # Not before: Ray sets a handler of its own, which aborts.
        signal.signal(signal.SIGTERM, _interrupt)
        said = ""
        while True:
            try:
                told = _told(state(), address)
            except Exception as error:  # noqa: BLE001 # Serve starts replicas anew that have died
                told = f"no replica answers: {last_line(error)}"
            if told != said:
                said = told
                say(told)
            time.sleep(LOOK_S)


def _told(state: ServiceState, address: Address) -> str:
    which = state.model.bundle if state.model.date is None else f"the model of {state.model.date}"
    if state.last_error is not None:
        return f"still serves {which}: {state.last_error}"
    return f"serves {which} at {address.url}/score (what it asks for: {address.url}/docs)"


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""`braid serve`: the application on Ray, until it is interrupted."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import Field

from deploy.bundle import describe
from deploy.serving.ownership import Application, running_replicas
from deploy.serving.service import ServiceConfig, build
from deploy.serving.state_lines import StateLines
from deploy.serving.wire import ServiceState
from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.cluster import RaySession, Terms, cluster_address, require_absolute
from pipeline.config import ClusterConfig
from pipeline.failures import last_line
from pipeline.samples.catalogue import check_catalogue

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Say = Callable[[str], None]

LOOK_S = 2.0
"""Between two looks at what the service serves."""
ANSWER_S = 60.0
"""Until a replica must have said what it serves, and a proxy must have an answer for a caller."""
ROOM_S = 300.0
"""Until a cluster must have room for the replicas."""
TERMS = Terms(
    processes="--replicas",
    cpus="--cpus-per-replica",
    autoscale="--autoscale-timeout-s",
    waiting=f"at least {ROOM_S:g}, or --autoscale-timeout-s",
)
DOWN_S = 300.0
"""Without a replica for so long, the service ends with an error: whoever supervises it notices."""


class Address(StrictConfig):
    """Where a service listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    route: str = Field(default="/", pattern=r"^/([\w.-]+(/[\w.-]+)*)?$")
    name: str = Field(default="braid", min_length=1)
    """Of the application on its cluster."""

    @property
    def url(self) -> str:
        """Of the endpoints, for callers."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{self.route.rstrip('/')}"


def check(config: ServiceConfig, address: Address) -> None:
    """What can be said before Ray starts.

    Raises:
        UserError: no model is there, its catalogue does not suit it, the port is in use, or a path
            is relative on a cluster.
    """
    model = config.current()
    bundle = describe(Path(model.bundle))
    root = config.root_of(bundle)
    given = {"--out": config.out, "--bundle": config.bundle, "--data (or data.root)": root}
    require_absolute({option: path for option, path in given.items() if path is not None})
    if not (root / "items.parquet").is_file():
        raise UserError(
            f"{root / 'items.parquet'} does not exist, and candidates have their columns from it; "
            "name the directory of items.parquet and users.parquet with --data"
        )
    check_catalogue(root, bundle.recipe.features)
    if cluster_address() is not None:  # Serve may listen there already, for others, too
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise UserError(
                f"--host {address.host} --port {address.port} cannot be listened on: "
                f"{error.strerror}; choose another port, or end what uses it"
            ) from error


@contextmanager
def running(
    config: ServiceConfig,
    address: Address,
    say: Say,
    *,
    replace: bool = False,
    autoscale_timeout_s: float | None = None,
) -> Iterator[Callable[[], ServiceState]]:
    """The service while the block runs; yields what asks a replica for its state.

    Args:
        config: of the service.
        address: where it listens, unless the cluster's Serve listens somewhere already.
        say: shows a line.
        replace: an application of this name.
        autoscale_timeout_s: for nodes that an autoscaler adds; None: the cluster is large enough.

    Raises:
        UserError: the cluster has no room, has such an application, or a replica refuses to start.
    """
    from ray import serve

    cluster = ClusterConfig(
        num_workers=config.replicas,
        cpus_per_worker=config.cpus_per_replica,
        wait_timeout_s=ROOM_S,
        autoscale_timeout_s=autoscale_timeout_s,
    )
    application = Application(address.name, token=uuid4().hex)
    for name in ("ray", "ray.serve"):  # replicas log to files of their own
        logging.getLogger(name).setLevel(logging.WARNING)
    with RaySession(cluster, say=say, terms=TERMS) as session:
        session.start()
        # Replicas of before give their room to those that take their place.
        held = _require_free(address, replace=replace)
        session.wait_for("serve", session.group()[held:])
        is_ours = _listen(address, say)
        try:
            handle = _started(config.model_copy(update={"token": application.token}), address)
            application.has_started = True
            yield lambda: handle.model.remote().result(timeout_s=ANSWER_S)
        finally:
            if not application.end():
                say(f"the application {address.name!r} goes on: it is not of this command")
            # A local Ray ends with the command; on a cluster, Serve may be somebody else's.
            if is_ours and cluster_address() is not None and not serve.status().applications:
                serve.shutdown()


def serve_until_ended(
    config: ServiceConfig,
    address: Address,
    say: Say,
    *,
    replace: bool = False,
    autoscale_timeout_s: float | None = None,
) -> None:
    """Serve, and tell when another model is served; SIGTERM and SIGINT end it.

    Raises:
        RuntimeError: no replica has answered for `DOWN_S`, or the application is gone.
    """
    with running(
        config, address, say, replace=replace, autoscale_timeout_s=autoscale_timeout_s
    ) as state:
        lines = StateLines(address.url, config.replicas)
        answered_s = time.monotonic()
        while True:
            try:
                line = lines.of(state())
                answered_s = time.monotonic()
            except Exception as error:  # noqa: BLE001 # Serve starts replicas anew that have died
                _require_alive(address, time.monotonic() - answered_s)
                line = lines.of_silence(last_line(error))
            if line is not None:
                say(line)
            time.sleep(LOOK_S)


def _listen(address: Address, say: Say) -> bool:
    """Start Serve, unless it runs; whether it was started here."""
    from ray import serve

    runs = bool(serve.status().proxies)
    if runs:
        say(
            "Serve runs on this cluster already, and listens where it was told then: --host and "
            f"--port change nothing; the route is {address.route}"
        )
    elif cluster_address() is not None and address.host.startswith("127."):
        say(f"callers on other machines need --host 0.0.0.0: it listens on {address.host} alone")
    options = {"host": address.host, "port": address.port, "request_timeout_s": ANSWER_S}
    serve.start(http_options=options)
    return not runs


def _require_free(address: Address, *, replace: bool) -> int:
    """Replicas of the application that is to be replaced."""
    from ray import serve

    held = running_replicas(address.name)
    if held is not None and not replace:
        status = serve.status().applications[address.name].status
        raise UserError(
            f"the cluster has an application {address.name!r} ({status}); --replace takes its "
            "place, and another --name and --route stand beside it"
        )
    return held or 0


def _started(config: ServiceConfig, address: Address) -> "DeploymentHandle":
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.run(build(config), name=address.name, route_prefix=address.route)
    except (RuntimeError, RayServeException, ValueError) as error:
        told = serve.status().applications.get(address.name)
        raise UserError(
            f"the service could not start: {last_line(error)} {told.message if told else ''}"
        ) from error


def _require_alive(address: Address, silent_s: float) -> None:
    from ray import serve

    known = serve.status().applications.get(address.name)
    if known is None:
        raise RuntimeError(f"the application {address.name!r} was deleted")
    if silent_s > DOWN_S:
        raise RuntimeError(
            f"no replica has answered for {silent_s:.0f} s ({known.status}: {known.message})"
        )

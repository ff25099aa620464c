"""`braid serve`, the model in production over HTTP, and `braid bench serve`, what it can do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding.files import write_durably
from pipeline.planning.cli import JsonOption

if TYPE_CHECKING:
    from typing import TypeVar

    from pydantic import BaseModel
    from rich.table import Table

    from deploy.serving.load import LoadFigures
    from deploy.serving.service import ServiceConfig

    Checked = TypeVar("Checked", bound=BaseModel)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Directory of items.parquet and users.parquet; default: the recipe's data.root. "
        "Rewritten files are read again.",
    ),
]
ReplicasOption = Annotated[
    int, typer.Option("--replicas", min=1, help="Processes, each with the whole model.")
]
CpusOption = Annotated[int, typer.Option("--cpus-per-replica", min=1, help="Threads of the model.")]


def serve(  # noqa: PLR0913 # a command's parameters are its options
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Output directory of the runs: its model in production is served, "
            "and the next one from when it is promoted.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Serve this bundle instead, and what takes its place there."),
    ] = None,
    data: DataOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    route: Annotated[
        str, typer.Option("--route", help="Path in front of /score, for several services.")
    ] = "/",
    name: Annotated[
        str, typer.Option("--name", help="Name of the application on its Ray cluster.")
    ] = "braid",
    replicas: ReplicasOption = 1,
    cpus_per_replica: CpusOption = 1,
    poll_s: Annotated[
        float,
        typer.Option(
            "--poll-s", min=0.1, help="Seconds between two looks at what is in production."
        ),
    ] = 10.0,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Take the place of an application of this name that is there."
        ),
    ] = False,
    autoscale_timeout_s: Annotated[
        float | None,
        typer.Option(
            "--autoscale-timeout-s",
            min=1,
            help="Where an autoscaler adds nodes: seconds to wait for those that replicas need. "
            "Default: the cluster must be large enough.",
        ),
    ] = None,
    encode_new_items: Annotated[
        bool,
        typer.Option(
            help="Give items that the bundle does not know a content vector, where it reads them."
        ),
    ] = True,
) -> None:
    """Serve the model in production over HTTP, with Ray Serve; promoted models take its place.

    POST /score scores candidates of a user, GET /model says what a request holds, /docs shows both.
    """
    from rich.markup import escape

    from deploy.serving.run import Address, check, serve_until_ended
    from pipeline.console import Reporter

    config = _config(
        out=out,
        bundle=bundle,
        data=data,
        encode_new_items=encode_new_items,
        replicas=replicas,
        cpus_per_replica=cpus_per_replica,
        poll_s=poll_s,
    )
    address = _checked(Address, host=host, port=port, route=route, name=name)
    reporter = Reporter()
    check(config, address)
    serve_until_ended(
        config,
        address,
        lambda text: reporter.line(escape(text)),
        replace=replace,
        autoscale_timeout_s=autoscale_timeout_s,
    )


def bench_serve(  # noqa: PLR0913 # a command's parameters are its options
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Output directory whose ingested events are asked about."),
    ],
    url: Annotated[
        str | None,
        typer.Option("--url", help="A running service; default: one is started for --out."),
    ] = None,
    data: DataOption = None,
    candidates: Annotated[
        int, typer.Option("--candidates", min=1, max=10_000, help="Candidates of a request.")
    ] = 200,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", min=1, help="Callers that each wait for their answer; default: 8."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            min=0.1,
            help="Requests a second, sent whether or not earlier ones are answered.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1)] = 20.0,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, help="Of its own service; default: 1.")
    ] = None,
    cpus_per_replica: Annotated[
        int | None, typer.Option("--cpus-per-replica", min=1, help="Of these; default: 1.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Ask a service about a day's users for a while: requests a second, and their times.

    The callers run on this machine, and take CPUs from a service that runs here, too.
    """
    from deploy.serving.bench import measure, measure_own
    from deploy.serving.load import LoadPlan
    from embedding.errors import UserError
    from pipeline.console import result_console

    own = {"replicas": replicas, "cpus_per_replica": cpus_per_replica}
    own = {name: value for name, value in own.items() if value is not None}
    if rate is not None and concurrency is not None:
        raise UserError(
            "--rate sends requests whatever is under way, so --concurrency would change nothing; "
            "give one of both"
        )
    if url is not None and own:
        raise UserError(
            f"--{next(iter(own)).replace('_', '-')} is of a service that this command starts, and "
            "--url names one that runs; give one of both"
        )
    plan = LoadPlan(seconds=seconds, concurrency=concurrency or 8, rate=rate, candidates=candidates)
    if url is None:
        figures = measure_own(_config(out=out, data=data, **own), plan)
    else:
        figures = measure(url.rstrip("/"), out, data, plan)
    if json_path is not None:
        write_durably(json_path, figures.model_dump_json(indent=2))
    result_console().print(_figures_table(figures))


def _config(**given: object) -> "ServiceConfig":
    from deploy.serving.service import ServiceConfig

    return _checked(ServiceConfig, **given)


def _checked(kind: "type[Checked]", **given: object) -> "Checked":
    """The options as a model.

    Raises:
        UserError: one of them is refused.
    """
    from pydantic import ValidationError

    from embedding.errors import UserError

    try:
        return kind.model_validate(given)
    except ValidationError as error:
        told = [
            "".join(f"--{part}={given[str(part)]}: " for part in one["loc"]) + one["msg"]
            for one in error.errors()
        ]
        raise UserError("; ".join(told)) from error


def _figures_table(figures: "LoadFigures") -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    times = ("p50 ms", "p95 ms", "p99 ms", "max ms")
    for column in ("requests/s", "candidates/s", *times, "failed", "status"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{figures.requests_per_s:.1f}",
        f"{figures.candidates_per_s:,.0f}",
        *(f"{ms:.1f}" for ms in (figures.p50_ms, figures.p95_ms, figures.p99_ms, figures.max_ms)),
        f"{figures.failed_share:.1%}",
        ", ".join(f"{count} x {status}" for status, count in figures.statuses.items()),
    )
    return table

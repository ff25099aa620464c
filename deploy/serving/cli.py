"""`braid serve`: the model in production over HTTP."""

from pathlib import Path
from typing import Annotated

import typer


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
        Path | None, typer.Option("--bundle", help="Serve this bundle instead, for good.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Directory of items.parquet and users.parquet; default: the recipe's "
            "data.root. Rewritten files are read again.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    route: Annotated[
        str, typer.Option("--route", help="Path in front of /score, for several services.")
    ] = "/",
    name: Annotated[
        str, typer.Option("--name", help="Of the application on its Ray cluster.")
    ] = "braid",
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Processes, each with the whole model.")
    ] = 1,
    cpus_per_replica: Annotated[
        int, typer.Option("--cpus-per-replica", min=1, help="Threads of the model.")
    ] = 1,
    poll_s: Annotated[
        float,
        typer.Option(
            "--poll-s", min=0.1, help="Seconds between two looks at what is in production."
        ),
    ] = 10.0,
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
    from pydantic import ValidationError
    from rich.markup import escape

    from deploy.serving.run import Address, check, serve_until_ended
    from deploy.serving.service import ServiceConfig
    from embedding.errors import UserError
    from pipeline.console import Reporter

    try:
        config = ServiceConfig(
            out=out,
            bundle=bundle,
            data=data,
            encode_new_items=encode_new_items,
            replicas=replicas,
            cpus_per_replica=cpus_per_replica,
            poll_s=poll_s,
        )
        address = Address(host=host, port=port, route=route, name=name)
    except ValidationError as error:
        raise UserError("; ".join(one["msg"] for one in error.errors())) from error
    reporter = Reporter()
    check(config, address)
    serve_until_ended(config, address, lambda text: reporter.line(escape(text)))

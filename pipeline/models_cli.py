"""`braid models`: published bundles, and which of them is in production."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.codes.cli import OutOption

models_app = typer.Typer(
    help="Published bundles and which of them is in production.", no_args_is_help=True
)
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@models_app.command("list")
def list_models(out: OutOption, as_json: AsJsonOption = False) -> None:
    """List the published bundles.

    State: `production`, `promoted` before (a rollback may return to it), `withdrawn` from
    production, or `published` and never promoted.
    """
    from pipeline.console import result_console
    from pipeline.models import model_list, models_table

    found = model_list(out)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        result_console().print(models_table(found))


@models_app.command()
def current(out: OutOption, as_json: AsJsonOption = False) -> None:
    """Print the path of the bundle in production: it never changes, and is what to serve."""
    from pipeline.models import current_model

    found = current_model(out)
    typer.echo(found.model_dump_json(indent=2) if as_json else found.bundle)


@models_app.command()
def promote(
    out: OutOption,
    date: Annotated[str, typer.Option("--date", "-d", help="Date of a published bundle.")],
) -> None:
    """Put a published bundle into production."""
    from pipeline.registry import promote as promote_model

    _say_production(out, promote_model(out, date).bundle)


@models_app.command()
def rollback(out: OutOption) -> None:
    """Return to the bundle that was in production before, and say what the next run starts from."""
    from pipeline.registry import rollback as roll_back

    _say_production(out, roll_back(out, typer.echo).bundle)


def _say_production(out: Path, bundle: Path) -> None:
    from pipeline.lineage import start_of_next_run

    typer.echo(f"in production: {bundle}")
    typer.echo(start_of_next_run(out))

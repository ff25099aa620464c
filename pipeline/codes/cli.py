"""`braid codes`: items of a code, codes of an item, and the versions of the codebooks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.codes.tables import Part

codes_app = typer.Typer(
    help="Semantic codes: items of a code, codes of an item, codebook versions.",
    no_args_is_help=True,
)

_WIDTH_OF_FILES = 200

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Output directory of the runs.")]


@codes_app.command()
def show(
    out: OutOption,
    date: Annotated[
        str | None, typer.Option("--date", "-d", help="Date of a run; default: the latest.")
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(help="A code or the beginning of one, level by level: 3, 3-17, 3-17-0."),
    ] = None,
    item: Annotated[
        str | None, typer.Option(help="An item id, as items.parquet writes it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to show of codes and of items.")] = 20,
) -> None:
    """Codes of a run: its levels; with --code the items of a code, with --item those of an item."""
    from pipeline.codes.lookup import CodesOfRun
    from pipeline.codes.tables import code_tables, header, item_tables, level_tables

    if code is not None and item is not None:
        raise typer.BadParameter("give --code or --item, not both")
    run = CodesOfRun.read(out, date)
    if code is not None:
        tables = code_tables(run, code, limit)
    elif item is not None:
        tables = item_tables(run, item)
    else:
        tables = level_tables(run, limit)
    _print(header(run), *tables)


@codes_app.command()
def versions(
    out: OutOption,
    version: Annotated[
        str | None, typer.Option(help="Show one version, like v0002, with its levels.")
    ] = None,
) -> None:
    """The codebook versions: what they were fitted to, what they go on with, how good they are."""
    from pipeline.codes.tables import version_tables, versions_table

    if version is None:
        _print(versions_table(out))
    else:
        _print(*version_tables(out, version))


def _print(*parts: "Part") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe folds nothing
        console.width = _WIDTH_OF_FILES
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))

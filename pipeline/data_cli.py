"""`braid data`: import public datasets, write the synthetic marketplace, check what is there."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.planning.cli import RecipeOption, SetOption

if TYPE_CHECKING:
    from pipeline.adapters.importing import ImportSummary, Progress

data_app = typer.Typer(
    help="Import datasets into the data contract, write the synthetic marketplace, check data.",
    no_args_is_help=True,
)
import_app = typer.Typer(help="Import a public dataset.", no_args_is_help=True)
data_app.add_typer(import_app, name="import")

SrcOption = Annotated[Path, typer.Option("--src", help="Folder of the unpacked download.")]
NewDirectoryOption = Annotated[Path, typer.Option("--out", "-o", help="Directory to create.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random draws.")]


@import_app.command()
def movielens(
    src: SrcOption,
    out: NewDirectoryOption,
    negatives: Annotated[
        int, typer.Option("--negatives", min=0, help="Sampled unrated items for each rating.")
    ] = 4,
    tags: Annotated[
        bool,
        typer.Option(
            "--tags",
            help="Add users' tags to the texts: whatever their date, so earlier days are told what "
            "viewers said later.",
        ),
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """MovieLens of any size and layout: tasks `like` and `watch`."""
    from pipeline.adapters.movielens import import_movielens

    _import(
        lambda progress: import_movielens(
            src, out, negatives=negatives, tags=tags, seed=seed, progress=progress
        ),
        out,
        unit="ratings",
    )


@import_app.command()
def frappe(src: SrcOption, out: NewDirectoryOption, seed: SeedOption = 0) -> None:
    """Frappe, apps used in context: task `use`, three pseudo-days (train, validation, test)."""
    from pipeline.adapters.frappe import import_frappe

    _import(lambda progress: import_frappe(src, out, seed=seed, progress=progress), out)


@import_app.command()
def criteo(
    src: SrcOption,
    out: NewDirectoryOption,
    days: Annotated[int, typer.Option("--days", min=1, help="Pseudo-days to split into.")] = 7,
    first_day: Annotated[
        str, typer.Option("--first-day", help="Name of the first pseudo-day, YYYY-MM-DD.")
    ] = "2014-01-01",
) -> None:
    """Criteo display ads (train.txt or day_N, plain or .gz): task `click`, pseudo-days."""
    from pipeline.adapters.criteo import import_criteo

    _import(
        lambda progress: import_criteo(src, out, days=days, first_day=first_day, progress=progress),
        out,
        unit="B",
    )


@import_app.command()
def avazu(src: SrcOption, out: NewDirectoryOption) -> None:
    """Avazu mobile ads (train.csv or train.gz): task `click`."""
    from pipeline.adapters.avazu import import_avazu

    _import(lambda progress: import_avazu(src, out, progress=progress), out, unit="B")


@data_app.command()
def synth(  # noqa: PLR0913 # every option of a command is a parameter
    out: NewDirectoryOption,
    days: Annotated[int, typer.Option("--days", min=1, help="Days of events.")] = 8,
    users: Annotated[int, typer.Option("--users", min=1, help="Users.")] = 2_000,
    items: Annotated[int, typer.Option("--items", min=1, help="Items alive on one day.")] = 1_000,
    events_per_day: Annotated[
        int, typer.Option("--events-per-day", min=1, help="Impressions a day.")
    ] = 20_000,
    seed: SeedOption = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another key of the marketplace: drift=0.2. May be repeated."),
    ] = None,
) -> None:
    """Write the synthetic marketplace: known click probability, text, images, births, drift."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.console import Reporter
    from pipeline.marketplace.synthetic import generate, synthetic_config

    sizes = {
        "num_days": days,
        "num_users": users,
        "num_items": items,
        "events_per_day": events_per_day,
        "seed": seed,
    }
    config = synthetic_config(sizes, overrides or ())
    reporter = Reporter()
    with reporter.stage("generate", unit="rows"):
        generate(config, out, progress=reporter.advance)
    table = Table("dataset", "days", "events", "items alive", "users", "seed", box=None)
    counts = (days, days * config.events_per_day, config.num_items, config.num_users, config.seed)
    table.add_row(str(out), *(f"{count:,}" for count in counts))
    Console(highlight=False).print(table)


@data_app.command()
def check(
    recipe: RecipeOption,
    date: Annotated[
        str | None,
        typer.Option("--date", "-d", help="Look into this day only, YYYY-MM-DD; default: all."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """List all faults of the data that a recipe reads: files, columns, types, days, first rows.

    Ends with 2 if there is any.
    """
    from rich.console import Console
    from rich.markup import escape

    from pipeline.recipe import load_recipe
    from pipeline.samples.delivery import check_delivery, grouped

    found = check_delivery(load_recipe(recipe, overrides or ()), date)
    console = Console(highlight=False, soft_wrap=True)
    faults = grouped(found.faults)
    for sentence in faults:
        console.print(f"[red]fault[/] {escape(sentence)}")
    for sentence in grouped(found.warnings):
        console.print(f"[yellow]warning[/] {escape(sentence)}")
    days = f"{found.days[0]} .. {found.days[-1]}" if found.days else "none"
    number = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    state = f"[red]{number}[/]" if faults else "[green]ok[/]"
    console.print(
        f"{state}: days {days}, {found.num_files} files, values of {found.num_rows:,} events"
    )
    raise typer.Exit(2 if faults else 0)


def _import(run: Callable[["Progress"], "ImportSummary"], out: Path, *, unit: str = "rows") -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.console import Reporter

    reporter = Reporter()
    with reporter.stage("import", unit=unit):
        summary = run(reporter.advance)
    table = Table("dataset", str(out), box=None, pad_edge=False)
    table.add_row("events", f"{summary.events:,}")
    table.add_row("days", f"{summary.days:,} ({summary.first_day} .. {summary.last_day})")
    table.add_row("items", f"{summary.items:,}")
    table.add_row("users", f"{summary.users:,}" if summary.users else "no table")
    for task, rate in summary.label_rates.items():
        table.add_row(f"{task} = 1", f"{rate:.2%} of the rows where it is observed")
    for note, count in summary.notes.items():
        table.add_row(note, f"{count:,}")
    Console(highlight=False).print(table)

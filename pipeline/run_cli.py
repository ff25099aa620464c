"""`braid run`, `stage` and `backfill`: the commands that run days in an output directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from pipeline.codes.cli import OutOption
from pipeline.consent import Consent, RefreshCatalogueOption, ShorterHistoriesOption
from pipeline.last_run import REFUSED, recorded
from pipeline.planning.cli import RecipeOption, SetOption

if TYPE_CHECKING:
    from pipeline.command import Command

DateOption = Annotated[str, typer.Option("--date", "-d", help="Day to train up to, YYYY-MM-DD.")]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        min=0,
        metavar="SECONDS",
        help="Seconds to wait while another command uses --out; 0: end with code 2 at once.",
    ),
]
STAGE_HELP = (
    "ingest, content, align, quantize, join, plan, train, evaluate, gate, catch_up or publish."
)


def run_command(  # noqa: PLR0913 # a command's parameters are its options
    context: typer.Context,
    recipe: RecipeOption,
    date: DateOption,
    out: OutOption,
    wait_s: WaitOption = 0,
    overrides: SetOption = None,
    shorter_histories: ShorterHistoriesOption = False,
    refresh_catalogue: RefreshCatalogueOption = False,
) -> None:
    """Run all stages of one day, from the raw events to the published bundle.

    Ends with 0 if the model was published, 1 if something failed, 2 if you must change something
    first, 3 if the gate refused the model.
    """
    place = _Place(
        out, f"braid run --date {date}", wait_s, Consent(shorter_histories, refresh_catalogue)
    )
    with _recorded(context, recipe, overrides or [], place) as command:
        refused = command.run_day(date)
    raise typer.Exit(REFUSED if refused else 0)


def stage_command(  # noqa: PLR0913 # a command's parameters are its options
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=STAGE_HELP)],
    recipe: RecipeOption,
    date: DateOption,
    out: OutOption,
    wait_s: WaitOption = 0,
    overrides: SetOption = None,
    shorter_histories: ShorterHistoriesOption = False,
    refresh_catalogue: RefreshCatalogueOption = False,
) -> None:
    """Run one stage of one day, and the stages before it that are not current.

    Ends as `braid run` does; with 3 if the gate, the last stage or one before it, refused.
    """
    place = _Place(
        out,
        f"braid stage {name} --date {date}",
        wait_s,
        Consent(shorter_histories, refresh_catalogue),
    )
    with _command(context, recipe, overrides or [], place) as command:
        refused = command.run_stage(name, date)
    raise typer.Exit(REFUSED if refused else 0)


def backfill_command(  # noqa: PLR0913 # a command's parameters are its options
    context: typer.Context,
    recipe: RecipeOption,
    first: Annotated[str, typer.Option("--from", help="First day, YYYY-MM-DD.")],
    last: Annotated[str, typer.Option("--to", help="Last day, YYYY-MM-DD.")],
    out: OutOption,
    wait_s: WaitOption = 0,
    overrides: SetOption = None,
    shorter_histories: ShorterHistoriesOption = False,
    refresh_catalogue: RefreshCatalogueOption = False,
) -> None:
    """Run day after day, each started from the day before and evaluated on the day after.

    Ends as `braid run` does; with 3 if the gate refused the model of any day.
    """
    place = _Place(
        out,
        f"braid backfill --from {first} --to {last}",
        wait_s,
        Consent(shorter_histories, refresh_catalogue),
    )
    with _recorded(context, recipe, overrides or [], place) as command:
        refused = command.run_days(first, last)
    raise typer.Exit(REFUSED if refused else 0)


class _Place(NamedTuple):
    """The directory that a command needs for itself, and what it may do there."""

    out: Path
    title: str
    """What others are told about the command."""
    wait_s: float
    consent: Consent


@contextmanager
def _recorded(
    context: typer.Context, recipe: str, overrides: list[str], place: _Place
) -> Iterator["Command"]:
    """A command whose ending is written down in the output directory, once that is its own."""
    with (
        _command(context, recipe, overrides, place) as command,
        recorded(place.out, place.title) as recording,
    ):
        recording.progress = lambda: command.progress
        yield command


@contextmanager
def _command(
    context: typer.Context, recipe: str, overrides: list[str], place: _Place
) -> Iterator["Command"]:
    """The recipe is checked before the output directory is touched or anything heavy loaded."""
    from pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from pipeline.command import Command
    from pipeline.lock import exclusive

    with (
        exclusive(place.out, place.title, wait_s=place.wait_s, say=typer.echo),
        Command(loaded, place.out, publish=context.obj, consent=place.consent) as command,
    ):
        yield command

"""The `braid` command put together: pipeline's commands and deploy's, with one error boundary."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.cli import export, score
from deploy.serving.cli import bench_serve, serve
from embedding.errors import UserError
from pipeline.cli import app
from pipeline.failures import last_line, user_error
from pipeline.planning.bench_cli import bench_app

if TYPE_CHECKING:
    from pipeline.config import Recipe
    from pipeline.stages import StageOutput

WITH_STAGES = ("run", "stage", "backfill", "study")
"""Commands that go on where they ended."""

app.command()(export)
app.command()(score)
app.command()(serve)
bench_app.command("serve")(bench_serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `braid ...`: 0 ok, 1 failed, 2 the user must change something, 3 the gate refused."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        # Typer prints usage errors itself and ends with SystemExit.
        app(given, obj=_publish)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except Exception as error:  # noqa: BLE001 # the process boundary: it becomes an exit code
        return _report(error, next((word for word in given if word[:1] != "-"), ""))
    return 0


def _report(error: Exception, command: str) -> int:
    """Print what the user must change, or the traceback of what failed."""
    remedy = user_error(error)
    if isinstance(remedy, UserError):
        _print_error(f"error: {remedy}")
        return 2
    traceback.print_exception(error)
    _print_error(f"failed: {type(error).__name__}: {last_line(error)}")
    if command in WITH_STAGES:
        _print_error("finished stages are kept; run the same command again to go on from here")
    return 1


def _print_error(text: str) -> None:
    sys.stderr.write(text + "\n")


def _publish(recipe: "Recipe", train: Path, scratch: Path) -> "StageOutput":
    """The publish stage; loaded when it runs."""
    from deploy.publish import publish

    return publish(recipe, train, scratch)

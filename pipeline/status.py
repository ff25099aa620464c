"""`braid status`: what ran in an output directory, what is stale, what failed."""

from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from embedding.errors import UserError
from pipeline.artifacts import read_manifest
from pipeline.cluster import RaySession
from pipeline.console import Reporter, duration, human
from pipeline.publication import Publish
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import production, published, require_output
from pipeline.run import DayRun
from pipeline.stages import STAGES, StageSpec, failure_of

_STYLE = {
    "current": "green",
    "stale": "yellow",
    "failed": "red",
    "missing": "dim",
    "refused": "yellow",
}


def status_table(out: Path, publish: Publish) -> Table:
    """One row for every stage of every run in `out`.

    Raises:
        UserError: `out` holds neither a run nor a model.
    """
    dates = _dates(out)
    if not dates and not published(out):
        raise UserError(f"--out {out} holds no run; start one with `braid run --out {out} ...`")
    table = Table()
    for column in ("date", "stage", "state", "rows", "time", "note"):
        table.add_column(column)
    for date in dates:
        for row in _rows(out, date, publish):
            table.add_row(*row)
    return table


def headline(out: Path) -> str:
    """What is in production, and whether runs are left.

    Raises:
        UserError: `out` is no directory.
    """
    require_output(out)
    current = production(out)
    line = f"{out}, in production: {current.date if current else 'none'}"
    return line if _dates(out) else f"{line}; no run is left, only published models"


def _dates(out: Path) -> list[str]:
    return sorted(path.parent.name for path in out.glob(f"????-??-??/{RECIPE_FILE}"))


def _rows(out: Path, date: str, publish: Publish) -> list[tuple[str, ...]]:
    """Of the stages of one date; one row that says why where that cannot be told."""
    try:
        return list(_stage_rows(out, date, publish))
    except UserError as error:
        return [(date, "", "[yellow]unknown[/]", "", "", escape(str(error)))]


def _stage_rows(out: Path, date: str, publish: Publish) -> Iterator[tuple[str, ...]]:
    recipe = read_recipe(out / date)
    run = DayRun(
        recipe,
        out,
        date,
        session=RaySession(recipe.cluster),
        reporter=Reporter(),
        publish=publish,
    )
    for name in STAGES:
        # A stage has an execution for every span of days; the one that needs work speaks for all.
        states = [(spec, *stage_state(spec)) for spec in run.specs(name)]
        if not states:  # nothing to do with this recipe
            continue
        spec, state, note = next((s for s in states if s[1] != "current"), states[0])
        manifest = read_manifest(spec.directory)
        figures = ("", "")
        if manifest is not None:
            figures = (human(manifest.rows_out), duration(manifest.seconds))
            if name == "gate" and state == "current" and not manifest.facts["passed"]:
                state, note = "refused", "; ".join(manifest.facts["reasons"])
        yield (date, name, f"[{_STYLE[state]}]{state}[/]", *figures, escape(note))


def stage_state(spec: StageSpec) -> tuple[str, str]:
    """`current`, `stale`, `failed` or `missing`, and why."""
    reason = failure_of(spec.directory)
    if reason is not None:
        return "failed", reason
    manifest = read_manifest(spec.directory)
    if manifest is None:
        return "missing", ""
    if spec.is_current:
        return "current", ""
    changed = [key for key, value in spec.inputs.items() if manifest.inputs.get(key) != value]
    return "stale", f"changed: {', '.join(changed) or 'configuration'}"

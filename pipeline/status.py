"""`braid status`: what ran in an output directory, what runs, what is stale, what failed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.artifacts import read_manifest
from pipeline.cluster import RaySession
from pipeline.console import Reporter, duration, human
from pipeline.gate_decision import GateDecision
from pipeline.last_run import LastRun, read_last_run
from pipeline.lock import Holder, holder
from pipeline.models import ModelEntry, current_model
from pipeline.pruned import what_was_pruned
from pipeline.publication import Publish
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import production, published, require_output
from pipeline.run import DayRun
from pipeline.stages import STAGES, StageSpec, failure_of, running_since

_STYLE = {
    "current": "green",
    "running": "cyan",
    "stale": "yellow",
    "failed": "red",
    "missing": "dim",
    "refused": "yellow",
}


class StageStatus(StrictConfig):
    """One stage of one run."""

    stage: str
    state: Literal["current", "running", "stale", "failed", "missing", "refused"]
    """`refused`: a gate that did not let the model through."""
    rows: int | None
    """That its artifact holds; None: there is none."""
    seconds: float | None
    """Of the execution that made it."""
    note: str
    """Why it is stale, failed or refused, and since when it runs."""


class RunStatus(StrictConfig):
    """The run of one date."""

    date: str
    problem: str | None
    """Why its stages cannot be looked into."""
    pruned: str | None = None
    """What is kept of it, where `braid prune` took the rest on purpose; no stage is shown then."""
    stages: tuple[StageStatus, ...]


class OutputStatus(StrictConfig):
    """`braid status --json`; version 1."""

    schema_version: Literal[1] = 1
    out: str
    production: ModelEntry | None
    held_by: Holder | None
    """The command that holds the directory now."""
    last_run: LastRun | None
    """How the last `braid run` or `braid backfill` ended."""
    runs: tuple[RunStatus, ...]
    """Oldest date first."""
    damaged: tuple[str, ...] | None = None
    """With `--verify`: a sentence for every file that is missing or damaged."""


def output_status(out: Path, publish: Publish) -> OutputStatus:
    """What there is to know of every run in `out`.

    Raises:
        UserError: `out` holds neither a run nor a model.
    """
    require_output(out)
    dates = sorted(path.parent.name for path in out.glob(f"????-??-??/{RECIPE_FILE}"))
    if not dates and not published(out):
        raise UserError(f"--out {out} holds no run; start one with `braid run --out {out} ...`")
    held_by = holder(out)
    return OutputStatus(
        out=str(out),
        production=None if production(out) is None else current_model(out),
        held_by=held_by,
        last_run=read_last_run(out),
        runs=tuple(_run_status(out, date, publish, held_by) for date in dates),
    )


def headlines(status: OutputStatus) -> Iterator[str]:
    """What is in production, and what goes on."""
    current = status.production
    line = f"{status.out}, in production: {current.date if current else 'none'}"
    yield line if status.runs else f"{line}; no run is left, only published models"
    if status.held_by is not None:
        yield f"in use by {status.held_by}"
    last = status.last_run
    if last is not None:
        why = "" if last.reason is None else f", {last.stage or 'before its stages'}: {last.reason}"
        yield f"last: `{last.command}` ended {last.ended_at}: {last.outcome} ({last.code}){why}"


def status_table(status: OutputStatus) -> Table:
    """One row for every stage of every run."""
    table = Table(box=SIMPLE)
    for column in ("date", "stage", "state", "rows", "time", "note"):
        table.add_column(column)
    for run in status.runs:
        if run.problem is not None:
            table.add_row(run.date, "", "[yellow]unknown[/]", "", "", escape(run.problem))
        if run.pruned is not None:
            table.add_row(run.date, "", "[dim]pruned[/]", "", "", run.pruned)
        for stage in run.stages:
            state = f"[{_STYLE[stage.state]}]{stage.state}[/]"
            rows = "" if stage.rows is None else human(stage.rows)
            time = "" if stage.seconds is None else duration(stage.seconds)
            table.add_row(run.date, stage.stage, state, rows, time, escape(stage.note))
    return table


def _run_status(out: Path, date: str, publish: Publish, held_by: Holder | None) -> RunStatus:
    pruned = what_was_pruned(out / date)
    if pruned is not None:
        return RunStatus(date=date, problem=None, pruned=pruned, stages=())
    try:
        stages = tuple(_stages(out, date, publish, held_by))
    except UserError as error:
        return RunStatus(date=date, problem=str(error), stages=())
    return RunStatus(date=date, problem=None, stages=stages)


def _stages(
    out: Path, date: str, publish: Publish, held_by: Holder | None
) -> Iterator[StageStatus]:
    recipe = read_recipe(out / date)
    root = recipe.data.root
    if not root.is_absolute() and not root.exists():
        raise UserError(
            f"data.root={root} is relative to the directory that the run was started in; call this "
            "command there"
        )
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
        states = [(spec, *stage_state(spec, held_by)) for spec in run.specs(name)]
        if not states:  # nothing to do with this recipe
            continue
        order = {"running": 0, "current": 2}
        spec, state, note = min(states, key=lambda found: order.get(found[1], 1))
        manifest = read_manifest(spec.directory)
        if name == "gate" and state == "current":
            decided = read_manifest(spec.directory, GateDecision)
            if decided is not None and not decided.facts.passed:
                state, note = "refused", "; ".join(decided.facts.reasons)
        yield StageStatus.model_validate(
            {
                "stage": name,
                "state": state,
                "rows": None if manifest is None else manifest.rows_out,
                "seconds": None if manifest is None else manifest.seconds,
                "note": note,
            }
        )


def stage_state(spec: StageSpec, held_by: Holder | None = None) -> tuple[str, str]:
    """`running` by whoever holds the directory, `current`, `stale`, `failed` or `missing`; why."""
    since = None if held_by is None else running_since(spec.directory, held_by)
    if since is not None:
        return "running", f"since {since}"
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

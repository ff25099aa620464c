"""`braid bench plan`: runs plans for real, and calibrates the predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedding.errors import UserError
from embedding.files import write_durably
from pipeline.planning.cli import (
    CalibrationOption,
    JsonOption,
    RecipeOption,
    SetOption,
    TrafficOption,
    writable,
)

if TYPE_CHECKING:
    from embedding.planning.plan_description import PlanDescription
    from pipeline.config import Recipe
    from pipeline.planning.bench import BenchEffort, BenchGroup, BenchReport
    from pipeline.planning.bench_command import BenchOptions

bench_app = typer.Typer(help="Measurements of this cluster.", no_args_is_help=True)

_SILENCES = (
    ("--exhaustive", "--shortlist", "it runs all plans, those predicted fastest among them"),
    ("--exhaustive", "--sample", "it runs all plans, random ones among them"),
    ("--shortlist", "--sample", "it runs the plans predicted fastest instead of others"),
)
"""An option, one that it silences, and why."""


@bench_app.command("plan")
def bench_plan(  # noqa: PLR0913 # every option of a command is a parameter
    recipe: RecipeOption = "demo",
    ranks: Annotated[
        list[int] | None,
        typer.Option("--ranks", min=1, help="Ranks to run on; the recipe's by default."),
    ] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="Run this plan file. May be repeated.")
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Run every sensible plan of a small model.")
    ] = False,
    sampled: Annotated[
        int, typer.Option("--sample", min=0, help="Run this many random plans as well.")
    ] = 0,
    shortlist: Annotated[
        int, typer.Option("--shortlist", min=0, help="Run the N plans predicted fastest instead.")
    ] = 0,
    best: Annotated[
        Path | None,
        typer.Option(
            "--best",
            help="Write the fastest measured plan here, to train with it.",
            callback=writable,
        ),
    ] = None,
    skew: Annotated[
        float | None, typer.Option("--skew", min=0, help="Zipf exponent of the ids; 0 is uniform.")
    ] = None,
    pooling: Annotated[
        list[str] | None,
        typer.Option("--pooling", help="Mean ids a sample: feature=12.5. May be repeated."),
    ] = None,
    batch_size_per_rank: Annotated[
        int | None, typer.Option("--batch-size-per-rank", min=1, help="Default: the recipe's.")
    ] = None,
    traffic: TrafficOption = None,
    calibration: CalibrationOption = None,
    calibrate_to: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="Measure parts and sampled plans; write constants here.",
            callback=writable,
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Take the peak memory of every plan.")
    ] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer plans and steps.")] = False,
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch",
            help="Directory that every node mounts at the same path; required with RAY_ADDRESS.",
        ),
    ] = None,
    json_file: JsonOption = None,
    overrides: SetOption = None,
) -> None:
    """Run plans for real: measured beside predicted; or calibrate the predictions."""
    given = {
        "--plan": bool(plans),
        "--exhaustive": exhaustive,
        "--shortlist": shortlist > 0,
        "--sample": sampled > 0,
        "--best": best is not None,
        "--skew": skew is not None,
        "--pooling": bool(pooling),
        "--batch-size-per-rank": batch_size_per_rank is not None,
        "--traffic": traffic is not None,
        "--calibration": calibration is not None,
        "--no-memory": not memory,
        "--json": json_file is not None,
    }
    refuse_ignored(given, calibrates=calibrate_to is not None)
    from pipeline.planning.bench import BenchEffort, BenchGroup
    from pipeline.planning.bench_command import FINAL_EFFORT, BenchOptions
    from pipeline.planning.request import RequestChanges
    from pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    sizes = ranks or [loaded.cluster.num_workers]
    group = BenchGroup(loaded.cluster, scratch).of(max(sizes))
    group.require_shared_scratch()
    if calibrate_to is not None:
        _calibrate(group, sizes, calibrate_to, quick=quick)
        return
    if len(sizes) > 1:
        raise UserError(
            "--ranks may be repeated with --calibrate only; run the bench once for each"
        )
    options = BenchOptions(
        plans=tuple(plans or ()),
        exhaustive=exhaustive,
        sampled=sampled,
        shortlist=shortlist,
        exponent=skew,
        pooling=tuple(pooling or ()),
        changes=RequestChanges(
            traffic=traffic, calibration=calibration, batch_size_per_rank=batch_size_per_rank
        ),
    )
    effort = BenchEffort(rounds=5 if quick else 9, memory_steps=3 if memory else 0)
    finals = None if best is None else BenchEffort() if quick else FINAL_EFFORT
    report, fastest = _measure(loaded, group, options, effort, finals=finals)
    _show(report, json_file)
    if best is not None and fastest is not None:
        _keep(fastest, best)


def refuse_ignored(given: Mapping[str, bool], *, calibrates: bool) -> None:
    """Refuse options that others would silence.

    Args:
        given: whether each option is, by its name.
        calibrates: whether `--calibrate` is.

    Raises:
        UserError: names both.
    """
    names = [name for name, is_given in given.items() if is_given]
    if calibrates and names:
        raise UserError(
            f"--calibrate measures random tables and plans of its own and would ignore "
            f"{', '.join(names)}; leave out one or the other, and run the bench a second time for "
            "what is left"
        )
    for winner, loser, why in _SILENCES:
        if given.get(winner) and given.get(loser):
            raise UserError(
                f"{winner} would ignore {loser}: {why}; leave out one of them, or run the bench "
                "once for each"
            )


def _calibrate(group: "BenchGroup", sizes: Sequence[int], path: Path, *, quick: bool) -> None:
    """Measure parts and sampled plans, and write the constants fitted to them."""
    from pipeline.cluster import RaySession
    from pipeline.console import Reporter
    from pipeline.plan import gpu_name, present_shape
    from pipeline.planning.bench_command import calibrate

    reporter = Reporter()
    with RaySession(group.cluster, say=reporter.line) as session:
        session.wait_for("bench", session.group())
        present, device_name = present_shape(group.cluster), gpu_name(group.cluster)
        made = calibrate(present, sizes, group, device_name, quick=quick, reporter=reporter)
    write_durably(path, made.model_dump_json(indent=2))
    reporter.line(f"calibration {path}")


def _measure(
    recipe: "Recipe",
    group: "BenchGroup",
    options: "BenchOptions",
    effort: "BenchEffort",
    *,
    finals: "BenchEffort | None",
) -> "tuple[BenchReport, PlanDescription | None]":
    """Run the plans that the options name, and the fastest of them again where there are finals."""
    from pipeline.cluster import RaySession
    from pipeline.console import Reporter
    from pipeline.plan import present_shape
    from pipeline.planning.bench_command import bench, bench_shape, fastest_plan, recipe_case

    reporter = Reporter()
    with RaySession(group.cluster, say=reporter.line) as session:
        session.wait_for("bench", session.group())
        shape = bench_shape(present_shape(group.cluster), group.cluster.num_workers)
        case = recipe_case(recipe, shape, options)
        reporter.line(f"{shape.name}: {len(case.plans)} plans of {case.name}")
        with reporter.stage("bench", unit="plans"):
            report = bench(case, shape, group, effort, reporter.advance)
        fastest = None if finals is None else fastest_plan(case, report, group, finals)
    return report, fastest


def _show(report: "BenchReport", json_file: Path | None) -> None:
    from pipeline.console import Reporter
    from pipeline.planning.bench_command import comparison_table

    reporter = Reporter()
    reporter.console.print(comparison_table(report))
    if json_file is not None:
        write_durably(json_file, report.model_dump_json(indent=2))
        reporter.line(f"report {json_file}")


def _keep(fastest: "PlanDescription", path: Path) -> None:
    """Write the plan that won, to train with it."""
    from pipeline.console import Reporter

    write_durably(path, fastest.model_dump_json(indent=2))
    Reporter().line(
        f"fastest: {fastest.proposer}, written to {path}; train with it by "
        f"--set embedding.sharding.plan={path}"
    )

"""`braid plan`, `traffic` and `capacity`: where tables go, and on which cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from embedding.planning.cluster_shape import ClusterShape
    from pipeline.config import ClusterConfig, Recipe

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Built-in recipe or path of a YAML file.")
]
TopologyOption = Annotated[
    str,
    typer.Option(
        "--topology",
        "-t",
        help="As h200:2x8 (hosts x ranks) or cpu:2, a YAML file, `here` (the ranks that the recipe "
        "trains on) or `cluster` (all that the Ray cluster has room for).",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a recipe key: path.to.key=value; add an entry: path.to.list+=value. May be "
        "repeated.",
    ),
]


def writable(path: Path | None) -> Path | None:
    """Hours of measuring must not end at a file that cannot be written."""
    from embedding.files import require_writable

    if path is not None:
        require_writable(path)
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result to this file.", callback=writable),
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="Measured constants (`bench plan`).")
]
TrafficOption = Annotated[
    Path | None, typer.Option("--traffic", help="Measured lookups (`braid traffic`).")
]


def plan_command(  # noqa: PLR0913 # every option of a command is a parameter
    recipe: RecipeOption,
    topology: TopologyOption = "here",
    json_file: JsonOption = None,
    constraints: Annotated[
        list[str] | None,
        typer.Option("--constraint", help="Force a sharding: table=row_wise. May be repeated."),
    ] = None,
    pin: Annotated[
        Path | None, typer.Option("--pin", help="Tables of this plan stay where it puts them.")
    ] = None,
    other: Annotated[Path | None, typer.Option("--diff", help="Compare with this plan.")] = None,
    calibration: CalibrationOption = None,
    traffic: TrafficOption = None,
    batch_size_per_rank: Annotated[
        int | None, typer.Option("--batch-size-per-rank", min=1, help="Default: the recipe's.")
    ] = None,
    kernels: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            help="Allow only these: fused, fused_uvm, fused_uvm_caching. May be repeated.",
        ),
    ] = None,
    also_torchrec: Annotated[
        bool, typer.Option("--also-torchrec", help="Begin from TorchRec's own plan as well.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Plan where the tables go on a topology.

    A named one needs neither GPUs nor Ray; `here` and `cluster` ask the Ray cluster what it is.
    """
    from rich.console import Console

    from embedding.files import write_durably
    from embedding.planning.plan_description import read_plan
    from pipeline.planning.request import (
        RequestChanges,
        known_kernels,
        left_out,
        parse_constraints,
        plan_with,
    )
    from pipeline.planning.tables_view import diff_table, plan_view

    loaded = _load(recipe, overrides)
    changes = RequestChanges(
        constraints=parse_constraints(constraints or (), loaded.features),
        pin=pin,
        calibration=calibration,
        traffic=traffic,
        batch_size_per_rank=batch_size_per_rank,
        kernels=known_kernels(kernels) if kernels else None,
        also_torchrec=also_torchrec,
    )
    before = None if other is None else read_plan(other)
    plan = plan_with(loaded, _shape(topology, loaded), changes)
    console = Console(highlight=False)
    for part in plan_view(plan):
        console.print(part)
    if (note := left_out(loaded, pin)) is not None:
        console.print(note)
    if before is not None:
        console.print(diff_table(before, plan))
    if json_file is not None:
        write_durably(json_file, plan.model_dump_json(indent=2))
        console.print(f"plan {json_file}")


def traffic_command(
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory with joined days.")],
    date: Annotated[
        str | None, typer.Option("--date", "-d", help="Last day to read; all days by default.")
    ] = None,
    json_file: JsonOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure how the tables are looked up, and what that says about their size."""
    from rich.console import Console

    from embedding.files import write_durably
    from embedding.planning.table_advice import table_facts
    from pipeline.cluster import ONE_CPU, RaySession
    from pipeline.console import Reporter
    from pipeline.planning.traffic import measure_traffic, sample_files
    from pipeline.planning.traffic_view import advice_lines, facts_table, growth_line

    loaded = _load(recipe, overrides)
    files = sample_files(out, date)
    reporter = Reporter()
    with RaySession(_no_ranks(loaded)) as session:
        session.wait_for("traffic", [ONE_CPU])
        with reporter.stage("traffic"):
            traffic = measure_traffic(loaded.features, files, reporter.advance)
    facts = table_facts(loaded.features.tables, traffic)
    console = Console(highlight=False)
    console.print(facts_table(facts))
    for line in advice_lines(facts):
        console.print(line)
    unknown = growth_line(traffic)
    if unknown is not None:
        console.print(unknown)
    if json_file is not None:
        write_durably(json_file, traffic.model_dump_json(indent=2))
        console.print(f"traffic {json_file}")


def capacity_command(  # noqa: PLR0913 # every option of a command is a parameter
    recipe: RecipeOption,
    topologies: Annotated[
        list[str],
        typer.Option(
            "--topology", "-t", help="A cluster, or a range that doubles: h200:1..16x8. Repeat."
        ),
    ],
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option("--batch-size-per-rank", min=1, help="Repeat. Default: the recipe's."),
    ] = None,
    growth: Annotated[
        list[float] | None,
        typer.Option("--growth", help="Factor of all tables' rows, beside 1. Repeat."),
    ] = None,
    dims: Annotated[
        list[float] | None,
        typer.Option("--dims", help="Factor of all tables' dims, beside 1. Repeat."),
    ] = None,
    rows_per_s: Annotated[
        float | None, typer.Option("--rows-per-s", min=1, help="Throughput it must reach.")
    ] = None,
    rows_per_day: Annotated[
        float | None, typer.Option("--rows-per-day", min=1, help="Rows of a daily retraining.")
    ] = None,
    window_hours: Annotated[
        float, typer.Option("--window-hours", min=0.01, help="Time a retraining may take.")
    ] = 4.0,
    growth_per_day: Annotated[
        float | None,
        typer.Option(
            "--growth-per-day",
            min=0,
            help="Share of today's rows gained a day: 0.002. Default: what traffic measured.",
        ),
    ] = None,
    traffic: TrafficOption = None,
    calibrations: Annotated[
        list[Path] | None, typer.Option("--calibration", help="Measured constants. Repeat.")
    ] = None,
    prices: Annotated[
        list[str] | None, typer.Option("--price", help="Of a host and hour: h200=80. Repeat.")
    ] = None,
    dense_flops_per_row: Annotated[
        float | None,
        typer.Option(
            "--dense-flops-per-row",
            min=0,
            help="Instead of counting the ranker's; its parameters are counted all the same.",
        ),
    ] = None,
    json_file: JsonOption = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write an HTML report.", callback=writable),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """How many of which machines the recipe needs, and what breaks first when tables grow."""
    from rich.console import Console

    from embedding.files import write_durably
    from pipeline.capacity.evaluate import run_capacity
    from pipeline.capacity.report import plan_line, points_table, write_capacity_report
    from pipeline.capacity.sweep import SweepOptions, sweep_request
    from pipeline.cluster import ONE_CPU, RaySession
    from pipeline.console import Reporter

    loaded = _load(recipe, overrides)
    request = sweep_request(
        loaded,
        SweepOptions(
            topologies=tuple(topologies),
            batch_sizes=tuple(batch_sizes or ()),
            growth=tuple(growth or ()),
            dims=tuple(dims or ()),
            rows_per_s=rows_per_s,
            rows_per_day=rows_per_day,
            window_hours=window_hours,
            growth_per_day=growth_per_day,
            traffic=traffic,
            calibrations=tuple(calibrations or ()),
            prices=tuple(prices or ()),
            dense_flops_per_row=dense_flops_per_row,
        ),
    )
    reporter = Reporter()
    with RaySession(_no_ranks(loaded)) as session:
        session.wait_for("capacity", [ONE_CPU])
        with reporter.stage("capacity", unit="points"):
            answer = run_capacity(request, reporter.advance)
    console = Console(highlight=False)
    console.print(f"[bold]{answer.answer}[/]")
    console.print(points_table(answer))
    if json_file is not None:
        write_durably(json_file, answer.model_dump_json(indent=2))
    if report is not None:
        command = None
        if answer.chosen is not None:
            command = plan_line(answer.chosen, recipe, request.recipe, overrides or ())
        write_capacity_report(answer, report, command)
        console.print(f"report {report}")
    raise typer.Exit(0 if answer.chosen is not None else 1)


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipeline.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


def _no_ranks(recipe: "Recipe") -> "ClusterConfig":
    """The cluster of a command that trains nothing."""
    nothing = {"num_workers": 1, "cpus_per_worker": 1, "use_gpu": False}
    return recipe.cluster.model_copy(update=nothing)


def _shape(text: str, recipe: "Recipe") -> "ClusterShape":
    from embedding.planning.cluster_shape import parse_shape

    if text not in ("here", "cluster"):
        return parse_shape(text)
    from pipeline.cluster import RaySession, worker_bundle
    from pipeline.plan import present_shape, training_shape

    _require_gpus(text, recipe.cluster)
    with RaySession(recipe.cluster) as session:
        session.wait_for("plan", [worker_bundle(recipe.cluster)])
        return training_shape(recipe) if text == "here" else present_shape(recipe.cluster)


def _require_gpus(text: str, cluster: "ClusterConfig") -> None:
    """A laptop has no GPUs to ask about ranks; a Ray that is started on it would say so, later."""
    from embedding.errors import UserError
    from pipeline.cluster import cluster_address

    if not cluster.use_gpu or cluster_address() is not None:
        return
    import torch

    found = torch.cuda.device_count()
    if found < cluster.num_workers:
        raise UserError(
            f"--topology {text} is this machine, as RAY_ADDRESS is not set: it has {found} GPUs, "
            f"and the recipe trains on {cluster.num_workers} (cluster.num_workers, use_gpu); name "
            "the cluster, as --topology h200:2x8, or run the command on it"
        )

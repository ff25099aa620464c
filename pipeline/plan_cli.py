"""`braid plan`, `traffic`, `capacity` and `bench plan`: where tables go, and on which cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from embedding.cluster_shape import ClusterShape
    from pipeline.config import Recipe

bench_app = typer.Typer(help="Measurements of this cluster.", no_args_is_help=True)

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="Built-in recipe or path of a YAML file.")
]
TopologyOption = Annotated[
    str,
    typer.Option(
        "--topology", "-t", help="As h200:2x8 (hosts x ranks) or cpu:2, a YAML file, or `here`."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe key: path.to.key=value. May be repeated."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
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
            help="Allow only these: fused, fused_uvm, fused_uvm_caching, "
            "key_value. May be repeated.",
        ),
    ] = None,
    also_torchrec: Annotated[
        bool, typer.Option("--also-torchrec", help="Begin from TorchRec's own plan as well.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Plan where the tables go on a topology; no GPU is needed."""
    from rich.console import Console

    from embedding.plan_description import read_plan
    from pipeline.plan_request import RequestChanges, plan_with
    from pipeline.plan_tables_view import diff_table, plan_view

    loaded = _load(recipe, overrides)
    changes = RequestChanges(
        constraints=tuple(constraints or ()),
        pin=pin,
        calibration=calibration,
        traffic=traffic,
        batch_size_per_rank=batch_size_per_rank,
        kernels=tuple(kernels) if kernels else None,
        also_torchrec=also_torchrec,
    )
    before = None if other is None else read_plan(other)
    plan = plan_with(loaded, _shape(topology, loaded), changes)
    console = Console(highlight=False)
    for part in plan_view(plan):
        console.print(part)
    if before is not None:
        console.print(diff_table(before, plan))
    if json_file is not None:
        json_file.write_text(plan.model_dump_json(indent=2))
        console.print(f"plan {json_file}")


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipeline.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


def _shape(text: str, recipe: "Recipe") -> "ClusterShape":
    from embedding.cluster_shape import parse_shape

    if text != "here":
        return parse_shape(text)
    from pipeline.cluster import RaySession
    from pipeline.plan import present_shape

    with RaySession(recipe.cluster) as session:
        session.start()
        return present_shape(recipe.cluster)

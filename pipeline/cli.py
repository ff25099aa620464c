"""The `braid` command. A command parses, loads the recipe, calls one function, prints one table.

Heavy imports (torch, ray, pyarrow) happen inside the commands, so that `--help` answers at once.
"""

import importlib.metadata
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.codes.cli import OutOption, codes_app
from pipeline.data_cli import data_app
from pipeline.models_cli import AsJsonOption, models_app
from pipeline.planning.bench_cli import bench_app
from pipeline.planning.cli import (
    JsonOption,
    RecipeOption,
    SetOption,
    capacity_command,
    plan_command,
    traffic_command,
)
from pipeline.run_cli import backfill_command, run_command, stage_command

if TYPE_CHECKING:
    from pipeline.config import Recipe

app = typer.Typer(
    name="braid",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
app.add_typer(codes_app, name="codes")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"braid {importlib.metadata.version('braid')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[  # noqa: ARG001 # its callback answers
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit; `braid doctor` names those of the packages below it.",
        ),
    ] = False,
) -> None:
    """Daily retraining of industrial ranking models on Ray and TorchRec."""


app.command("run")(run_command)
app.command("stage")(stage_command)
app.command("backfill")(backfill_command)


@app.command()
def study(  # noqa: PLR0913 # a command's parameters are its options
    recipe: RecipeOption,
    variants: Annotated[
        Path,
        typer.Option(
            help="YAML file: names to lists of path.to.key=value; the first is the yardstick."
        ),
    ],
    out: OutOption,
    seeds: Annotated[int, typer.Option(min=1, help="Trials a variant, with seeds of their own.")],
    date: Annotated[
        str | None, typer.Option("--date", "-d", help="Day to train up to; default: the last.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Variant the others are compared with; default: the first.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to show, e.g. like.cold.auc. May be repeated.")
    ] = None,
    json_file: JsonOption = None,
    trials_per_gpu: Annotated[
        int, typer.Option(min=1, help="Trials that share a GPU; a small model does not fill one.")
    ] = 1,
    max_parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trials side by side at most; default: as many as fit on the cluster."
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Compare variants of a recipe over seeds: mean, 95% interval, paired differences."""
    from rich.markup import escape

    from embedding.files import write_durably
    from pipeline.lock import exclusive
    from pipeline.study.report import (
        require_metrics,
        shown_metrics,
        slice_tables,
        study_table,
        write_study_report,
    )
    from pipeline.study.study import Study, read_variants

    chosen = read_variants(variants, against)
    with exclusive(out, f"braid study --recipe {recipe}"):
        work = Study(
            recipe,
            chosen,
            date=date,
            num_seeds=seeds,
            out=out,
            overrides=overrides or (),
            trials_per_gpu=trials_per_gpu,
            max_parallel=max_parallel,
        )
        require_metrics(work.recipes.values(), metric or ())
        result = work.run()
        if json_file is not None:
            write_durably(json_file, result.model_dump_json(indent=2))
        metrics = shown_metrics(work.first, result, metric or ())
        report = write_study_report(result, metrics, out)
    work.reporter.console.print(study_table(result, metrics), *slice_tables(result))
    work.reporter.line(escape(f"report  {report}"))
    raise typer.Exit(1 if result.failed else 0)


@app.command()
def status(
    context: typer.Context,
    out: OutOption,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also read every file and compare it with its checksum."),
    ] = False,
    as_json: AsJsonOption = False,
) -> None:
    """What ran, what is stale, what failed; with --verify, what is damaged."""
    from pipeline.console import result_console
    from pipeline.status import headlines, output_status, status_table

    found = output_status(out, context.obj)
    if verify:
        found = found.model_copy(update={"damaged": _damage(out, to_stderr=as_json)})
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        for line in headlines(found):
            typer.echo(line)
        result_console().print(status_table(found))
    raise typer.Exit(1 if found.damaged else 0)


@app.command()
def prune(
    out: OutOption,
    keep: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many to keep: latest runs, earlier promotions, bundles never promoted.",
        ),
    ] = 7,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")
    ] = False,
) -> None:
    """Delete what no next run and no rollback needs: old runs, samples, models, leftovers."""
    from pipeline.console import result_console, size
    from pipeline.lock import exclusive
    from pipeline.prune import SetAside, freed_bytes, prunable, prune_table, set_aside, tried
    from pipeline.registry import require_output

    require_output(out)
    with nullcontext() if dry_run else exclusive(out, f"braid prune --keep {keep}"):
        aside = SetAside(prunable(out, keep), []) if dry_run else set_aside(out, keep)
        found = aside.found
        freed = size(freed_bytes(found))
        if found:
            result_console().print(prune_table(found))
        if candidates := tried(out, keep):
            typer.echo(f"kept: published, never promoted, of {', '.join(candidates)}")
        if not dry_run:
            aside.delete()
    if not found:
        typer.echo("nothing to delete: a next run or a rollback needs all that is there")
    else:
        typer.echo(f"{'would free' if dry_run else 'freed'} {freed}")


app.command("plan")(plan_command)
app.command("traffic")(traffic_command)
app.command("capacity")(capacity_command)


@app.command()
def validate(recipe: RecipeOption, overrides: SetOption = None) -> None:
    """Check a recipe without loading torch or touching a cluster."""
    from rich.console import Console
    from rich.markup import escape

    from pipeline.recipe_files import check_recipe_files

    loaded = _load(recipe, overrides)
    check_recipe_files(loaded)
    features, tasks = loaded.features, ", ".join(task.name for task in loaded.ranking.tasks)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[green]ok[/] {escape(loaded.name)}: {len(features.tables)} tables, "
        f"{len(features.sparse)} sparse, {len(features.dense)} dense and "
        f"{len(features.sequences)} sequence features, tasks {escape(tasks)}"
    )
    for line in _derived(loaded) + _unread(loaded):
        console.print(f"   {escape(line)}")


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.recipe import load_recipe, recipe_names

    table = Table("recipe", "tasks", "what it is", box=None, pad_edge=False)
    for name in recipe_names():
        recipe = load_recipe(name)
        tasks = ", ".join(task.name for task in recipe.ranking.tasks)
        table.add_row(name, tasks, recipe.description.strip())
    Console().print(table)


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a page to read, docs/recipe.md.")
    ] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors and checks."""
    from pipeline.config import Recipe
    from pipeline.reports.recipe_page import recipe_page

    if markdown:
        typer.echo(recipe_page(), nl=False)
    else:
        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def doctor() -> None:
    """Check versions, accelerator, memory and Ray, and say how to mend what is wrong."""
    from rich.console import Console

    from pipeline.doctor import diagnose, diagnosis_table

    findings = diagnose()
    Console().print(diagnosis_table(findings))
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 2)


def _damage(out: Path, *, to_stderr: bool) -> tuple[str, ...]:
    """Read all that is in an output directory and say what of it is damaged."""
    from rich.console import Console
    from rich.markup import escape

    from pipeline.console import Reporter
    from pipeline.verify import verify

    reporter = Reporter(Console(highlight=False, stderr=to_stderr))
    with reporter.stage("verify", "directories"):
        found = verify(out, reporter.advance)
    for sentence in found:
        reporter.line(f"[red]damaged[/] {escape(sentence)}")
    if not found:
        reporter.line("[green]ok[/] every file is as it was written")
    return tuple(found)


def _derived(recipe: "Recipe") -> list[str]:
    """Tables and features that follow from the section `codes`, which the recipe does not show."""
    from multimodal.codes.schema import without_codes

    features, own = recipe.features, without_codes(recipe.features)
    if features == own:
        return []
    tables = [t for t in features.tables if t not in own.tables]
    names = [f.name for f in features.id_features if f.source == "codes"]
    names += [f.name for f in features.dense if f.source == "codes"]
    sizes = ", ".join(f"{t.name} {t.num_embeddings} x {t.embedding_dim}" for t in tables)
    lines = [f"tables of codes: {sizes}", f"features of codes: {', '.join(names)}"]
    if recipe.codes is not None and recipe.codes.taken_from is not None:
        lines.append(f"codes are taken from the runs of {recipe.codes.taken_from}")
    return lines


def _unread(recipe: "Recipe") -> list[str]:
    """Sequences that cost a lookup and reach no part of the model."""
    read = {interest.history for interest in recipe.ranking.model.interests}
    if recipe.content is not None and recipe.content.in_history:
        read |= {history.name for history in recipe.features.histories}
    unread = [s.name for s in recipe.features.sequences if s.history not in read]
    if not unread:
        return []
    return [f"looked up, and read by nothing (ranking.model.interests): {', '.join(unread)}"]


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipeline.recipe import load_recipe

    return load_recipe(recipe, overrides or ())

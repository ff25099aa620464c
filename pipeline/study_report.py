"""The table and the page of a study."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE
from rich.table import Table

from embedding.errors import UserError
from pipeline import charts
from pipeline.config import Recipe
from pipeline.study_statistics import Difference, Estimate, StudyResult

STUDY_REPORT = "study.html"


def shown_metrics(recipe: Recipe, result: StudyResult, wanted: Sequence[str]) -> list[str]:
    """Metrics to show: those asked for, else AUC and logloss of every task.

    Raises:
        UserError: a metric that no trial has.
    """
    known = sorted({name for variant in result.variants.values() for name in variant})
    for name in wanted:
        if name not in known:
            raise UserError(f"--metric {name}: no trial has it; metrics are {', '.join(known)}")
    tasks = [task.name for task in recipe.ranking.tasks]
    default = [f"{task}.{metric}" for task in tasks for metric in ("auc", "logloss")]
    return list(wanted) or [name for name in default if name in known]


def study_table(result: StudyResult, metrics: Sequence[str]) -> Table:
    """One row a variant: mean and interval of every metric, and the difference to the first."""
    first = next(iter(result.variants))
    table = Table(
        title=f"{result.recipe} {result.date}, {len(result.seeds)} seeds: mean +- 95% interval; "
        f"difference to {first}, paired by seed, bold where its interval excludes 0",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("variant", no_wrap=True)
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
        table.add_column("diff", justify="right", no_wrap=True)
    for variant, found in result.variants.items():
        cells = []
        for metric in metrics:
            cells.append(estimate(found.get(metric)))
            difference = result.paired.get(variant, {}).get(metric)
            text = signed(difference)
            cells.append(f"[bold]{text}[/]" if difference and difference.sure else text)
        table.add_row(variant, *cells)
    return table


def write_study_report(result: StudyResult, metrics: Sequence[str], directory: Path) -> Path:
    """Write `study.html` in one move."""
    environment = Environment(
        loader=PackageLoader("pipeline"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("study.html.j2").render(
        result=result,
        metrics=metrics,
        first=next(iter(result.variants)),
        rows=[
            {
                "name": name,
                "overrides": result.overrides[name],
                "cells": [
                    (estimate(found.get(m)), result.paired.get(name, {}).get(m)) for m in metrics
                ],
            }
            for name, found in result.variants.items()
        ],
        charts=[(metric, _chart(result, metric)) for metric in metrics],
        signed=signed,
    )
    partial = directory / f"{STUDY_REPORT}.partial"
    partial.write_text(page)
    return partial.replace(directory / STUDY_REPORT)


def _chart(result: StudyResult, metric: str) -> str:
    values = {
        name: (found[metric].mean, found[metric].ci95 or 0.0)
        for name, found in result.variants.items()
        if metric in found
    }
    return charts.intervals(values, x_label=f"{metric}, mean and 95% interval")


def estimate(found: Estimate | None) -> str:
    """`0.9812 +- 0.0003`; a dash where there is none."""
    if found is None:
        return "-"
    digits = 4 if abs(found.mean) < 100 else 0
    mean = f"{found.mean:.{digits}f}"
    return mean if found.ci95 is None else f"{mean} +- {found.ci95:.{digits}f}"


def signed(difference: Difference | None) -> str:
    """`+0.0012 +- 0.0003`; empty where there is none."""
    if difference is None:
        return ""
    digits = 4 if abs(difference.diff) < 100 else 0
    diff = f"{difference.diff:+.{digits}f}"
    return diff if difference.ci95 is None else f"{diff} +- {difference.ci95:.{digits}f}"

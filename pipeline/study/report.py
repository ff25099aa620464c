"""The table and the page of a study."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from embedding.errors import UserError, nearest_name
from pipeline.config import Recipe
from pipeline.evaluate import SLICES
from pipeline.reports import charts
from pipeline.reports.page import write_page
from pipeline.study.statistics import (
    CONFIDENCE,
    METRICS,
    OF_A_TRIAL,
    Difference,
    Estimate,
    StudyResult,
    is_better,
)

STUDY_REPORT = "study.html"
SCOPE = "over seeds, given these evaluation days"
"""What an interval is an interval over; it says nothing about other days."""
INCOMPLETE = "; n: seeds that have the figure, where not all do"


@dataclass(frozen=True)
class Cell:
    """A metric of a variant, and its difference to the first."""

    estimate: str
    difference: str
    stands_out: bool
    """Its interval excludes 0, and it is no figure of the machine."""
    tone: str
    """Class of the difference in the page: good, bad, soft or none."""

    @classmethod
    def of(
        cls,
        metric: str,
        found: Estimate | None,
        difference: Difference | None,
        seeds: tuple[int, ...],
    ) -> "Cell":
        """As it is shown; with the number of its seeds where those are not all of the study's."""
        stands_out = (
            difference is not None and difference.excludes_zero and metric not in OF_A_TRIAL
        )
        tone = "soft"
        if difference is not None and stands_out:
            tone = {True: "good", False: "bad", None: ""}[is_better(metric, difference.diff)]
        mean = estimate(found) + _fewer(found, seeds)
        return cls(mean, signed(difference) + _fewer(difference, seeds), stands_out, tone)


def require_metrics(recipes: Iterable[Recipe], wanted: Sequence[str]) -> None:
    """Hours of trials must not end at a misspelt metric.

    Raises:
        UserError: no trial of these recipes can have it.
    """
    tasks = dict.fromkeys(task.name for recipe in recipes for task in recipe.ranking.tasks)
    parts = [*tasks, *(f"{task}.{name}" for task in tasks for name in SLICES)]
    known = [*(f"{part}.{metric}" for part in parts for metric in METRICS), *OF_A_TRIAL]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--metric {name}: there is no such metric{nearest_name(name, known)}; metrics are "
                f"TASK.METRIC, TASK.SLICE.METRIC ({', '.join(tasks)}; {', '.join(SLICES)}; "
                f"{', '.join(METRICS)}), {' and '.join(OF_A_TRIAL)}"
            )


def shown_metrics(recipe: Recipe, result: StudyResult, wanted: Sequence[str]) -> list[str]:
    """Metrics to show: those asked for, else AUC and logloss of every task.

    Raises:
        UserError: a metric that no trial that finished has.
    """
    known = sorted({name for variant in result.variants.values() for name in variant})
    for name in wanted:
        if name not in known:
            raise UserError(
                f"--metric {name}: no trial that finished has it (a slice without rows, or with "
                "rows of one class, has no such figure); name another one, and finished trials are "
                f"not run again; metrics are {', '.join(known)}"
            )
    tasks = [task.name for task in recipe.ranking.tasks]
    default = [f"{task}.{metric}" for task in tasks for metric in ("auc", "logloss")]
    return list(wanted) or [name for name in default if name in known]


def chance_note(result: StudyResult, metrics: Iterable[str]) -> str:
    """How many intervals could be marked, and how many are by chance; empty without any.

    They are corrected for nothing: each excludes 0 in 5% of the studies of variants that are equal.
    """
    wanted = set(metrics) - set(OF_A_TRIAL)
    count = sum(
        name in wanted and difference.ci95 is not None
        for variant in result.paired.values()
        for name, difference in variant.items()
    )
    if not count:
        return ""
    expected = (1 - CONFIDENCE) * count
    return (
        f"{count} comparison{'s' if count > 1 else ''}, not corrected for their number: were all "
        f"variants equal, {expected:.2g} of them would be marked by chance"
    )


def study_table(result: StudyResult, metrics: Sequence[str]) -> Table:
    """Mean and interval of every metric and variant, and the difference to the first variant."""
    first = next(iter(result.variants))
    title = (
        f"{result.recipe} {result.date}, {len(result.seeds)} seeds: mean +- 95% interval {SCOPE}; "
        f"difference to {first}, paired by seed, bold where its interval excludes 0"
        f"{_incomplete(result)}"
    )
    table = _table(title, ("metric", "variant"), ("mean", "diff"))
    table.caption = chance_note(result, metrics)
    for metric in metrics:
        for variant in result.variants:
            cells = _marked(_cells(result, variant, [metric]))
            table.add_row(metric if variant == first else "", variant, *cells)
    return table


def _incomplete(result: StudyResult) -> str:
    """What (n=...) is, where a figure is of fewer seeds than the study has."""
    found = (part for variant in result.variants.values() for part in variant.values())
    return INCOMPLETE if any(len(part.seeds) < len(result.seeds) for part in found) else ""


def slice_tables(result: StudyResult) -> list[Table]:
    """AUC by slice of the evaluated rows, a table a task: who gains, known items or new ones."""
    return [_slice_table(result, task, metrics) for task, metrics in slice_metrics(result).items()]


def slice_metrics(result: StudyResult) -> dict[str, dict[str, str]]:
    """The AUC metric of every slice, by task and slice."""
    found: dict[str, dict[str, str]] = {}
    for variant in result.variants.values():
        for name in variant:
            task, _, part = name.removesuffix(".auc").partition(".")
            if name.endswith(".auc") and part:
                found.setdefault(task, {})[part] = name
    return found


def _slice_table(result: StudyResult, task: str, metrics: Mapping[str, str]) -> Table:
    table = _table(f"{task}: AUC by slice", ("slice", "variant"), ("rows", "auc", "diff"))
    table.caption = chance_note(result, metrics.values())
    for name, metric in metrics.items():
        for variant, found in result.variants.items():
            rows = found.get(f"{task}.{name}.num_rows")
            shown = "-" if rows is None else f"{rows.mean:,.0f}"
            is_first = variant == next(iter(result.variants))
            cells = _marked(_cells(result, variant, [metric]))
            table.add_row(name if is_first else "", variant, shown, *cells)
    return table


def _table(title: str, names: Iterable[str], figures: Iterable[str]) -> Table:
    """Empty, and narrow: whole intervals must fit a terminal of 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for name in names:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _marked(cells: Iterable[Cell]) -> Iterator[str]:
    """For a terminal: bold where an interval excludes 0."""
    for cell in cells:
        yield cell.estimate
        yield f"[bold]{cell.difference}[/]" if cell.stands_out else cell.difference


def _cells(result: StudyResult, variant: str, metrics: Iterable[str]) -> list[Cell]:
    """Every metric of a variant."""
    found, paired = result.variants[variant], result.paired.get(variant, {})
    return [
        Cell.of(metric, found.get(metric), paired.get(metric), result.seeds) for metric in metrics
    ]


def write_study_report(result: StudyResult, metrics: Sequence[str], directory: Path) -> Path:
    """Write `study.html` in one move."""
    by_task = slice_metrics(result)
    of_slices = [metric for columns in by_task.values() for metric in columns.values()]
    return write_page(
        directory / STUDY_REPORT,
        "study.html.j2",
        result=result,
        first=next(iter(result.variants)),
        tables=[
            _section(result, "Variants", {metric: metric for metric in metrics}),
            *(
                _section(result, f"{task}: AUC by slice", _with_rows(result, task, columns))
                for task, columns in by_task.items()
            ),
        ],
        chance=chance_note(result, [*metrics, *of_slices]),
        charts=[(metric, _chart(result, metric)) for metric in metrics],
        scope=SCOPE,
        incomplete=_incomplete(result),
    )


def _section(result: StudyResult, title: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """A table of the page; `columns` are metrics by heading."""
    rows = [(name, _cells(result, name, columns.values())) for name in result.variants]
    return {"title": title, "columns": columns, "rows": rows}


def _with_rows(result: StudyResult, task: str, metrics: Mapping[str, str]) -> dict[str, str]:
    """Metrics of slices by heading: the slice, and how many rows of it the first variant has."""
    first = next(iter(result.variants.values()))
    headings = {}
    for name, metric in metrics.items():
        rows = first.get(f"{task}.{name}.num_rows")
        headings[name if rows is None else f"{name} ({rows.mean:,.0f})"] = metric
    return headings


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


def _fewer(part: Estimate | Difference | None, seeds: tuple[int, ...]) -> str:
    return "" if part is None or len(part.seeds) == len(seeds) else f" (n={len(part.seeds)})"


def signed(difference: Difference | None) -> str:
    """`+0.0012 +- 0.0003`; empty where there is none."""
    if difference is None:
        return ""
    digits = 4 if abs(difference.diff) < 100 else 0
    diff = f"{difference.diff:+.{digits}f}"
    return diff if difference.ci95 is None else f"{diff} +- {difference.ci95:.{digits}f}"

"""What `braid run`, `stage` and `backfill` do once the recipe is loaded and the directory held."""

from pathlib import Path
from typing import Self

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from embedding.errors import UserError
from pipeline.cluster import RaySession, actors_of, require_absolute
from pipeline.codes.taken_codes import require_codes
from pipeline.config import Recipe
from pipeline.consent import Consent
from pipeline.console import Reporter, duration, figure, human
from pipeline.days import available_days, parse_day, require_complete, split_days
from pipeline.gate_decision import GateDecision
from pipeline.last_run import Progress
from pipeline.lineage import passed_over, whole_parent
from pipeline.marketplace.synthetic import ensure_data
from pipeline.output_name import claim
from pipeline.pruned import forget_pruned
from pipeline.publication import Publish
from pipeline.recipe import write_recipe
from pipeline.recipe_files import check_recipe_files, tower_folders
from pipeline.registry import promote_newest, promotions
from pipeline.reports.report import REPORT, write_report
from pipeline.run import DayRun
from pipeline.stages import CATCH_UP, STAGES
from pipeline.summary import SUMMARY, Summary, noted_now, read_summary, summarize, write_summary
from ranking.task_metrics import SliceMetrics


class Command:
    """Runs days of one recipe in one output directory; use it as a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        publish: Publish,
        consent: Consent = Consent(),  # noqa: B008 # frozen
    ) -> None:
        """Nothing is started.

        Raises:
            UserError: a file that a stage will read is missing or does not suit the recipe, or a
                path is relative on a cluster.
        """
        check_recipe_files(recipe)
        require_absolute({"--out": out, "data.root": recipe.data.root, **tower_folders(recipe)})
        self.recipe = recipe
        self.out = out
        self.publish = publish
        self.consent = consent
        self.reporter = Reporter()
        self._date: str | None = None
        self._at: DayRun | None = None
        self._refusals: list[str] = []
        self._noted: dict[str, list[str]] = {}
        """Warnings by date that are of no stage."""
        self.session = RaySession(recipe.cluster, actors=actors_of(recipe), say=self.reporter.line)

    def __enter__(self) -> Self:
        claim(self.out, self.recipe.name)
        ensure_data(self.recipe, self.reporter)
        return self

    def __exit__(self, *error: object) -> None:
        self.session.__exit__(*error)

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        stage = None if self._at is None else self._at.at
        noted = (f"{date}: {line}" for date, lines in self._noted.items() for line in lines)
        return Progress(self._date, stage, tuple(self._refusals), tuple(noted))

    def run_stage(self, name: str, date: str) -> bool:
        """Run one stage and those before it that are not current; whether the gate refused."""
        if name not in STAGES:
            raise UserError(f"stage {name!r} does not exist; stages are {', '.join(STAGES)}")
        if name in ("align", "quantize") and self.recipe.codes is None:
            raise UserError(f"stage {name} makes codes of items, and codes is null; set it")
        if name == "align" and self.recipe.codes is not None and self.recipe.codes.taken_from:
            origin = self.recipe.codes.taken_from
            raise UserError(
                f"stage align makes item vectors, and codes.taken_from={origin} takes codes that "
                f"are there; run the stage with the recipe and --out of {origin}"
            )
        if name == "content" and self.recipe.content is None:
            raise UserError(
                "stage content reads items' text and images, and content is null; set it"
            )
        if name == CATCH_UP and not self.recipe.publish.catch_up:
            raise UserError(
                f"stage {CATCH_UP} trains on the days that a model was evaluated on, and "
                "publish.catch_up is false; set it"
            )
        run = self._day(date)
        self._write_recipe(date)
        last = run.execute(until=name)[-1]
        return last.name == "gate" and self._refused(date, run.decision())

    def run_day(self, date: str) -> bool:
        """Run one day and show its figures; whether the gate refused the model."""
        summary = self._run(date)
        self.reporter.console.print(_metrics_table(summary))
        directory = self.out / date
        self.reporter.line(escape(f"summary {directory / SUMMARY}\nreport  {directory / REPORT}"))
        return self._refused(date, summary.gate)

    def run_days(self, first: str, last: str) -> bool:
        """Run every day of the log from `first` to `last`; whether any gate refused.

        Raises:
            UserError: There is no such day, or one of them cannot be split; none is run then.
        """
        parse_day(first, "--from")
        parse_day(last, "--to")
        root, marker = self.recipe.data.root, self.recipe.data.complete_marker
        for day in available_days(root):
            if first <= day <= last:
                require_complete(root, day, marker)
        available = available_days(root, marker)
        days = [day for day in available if first <= day <= last]
        if not days:
            raise UserError(
                f"--from {first} --to {last}: the event log has no such day (it has "
                f"{available[0]} .. {available[-1]})"
            )
        for day in days:
            split_days(available, day, self.recipe.window)
            require_codes(self.recipe, self.out, day)
        summaries = []
        for day in days:
            self.reporter.line(f"[bold]{day}[/]")
            summaries.append(self._run(day))
        self.reporter.console.print(_progressive_table(summaries))
        refused = [self._refused(summary.date, summary.gate) for summary in summaries]
        return any(refused)

    def _day(self, date: str) -> DayRun:
        self._date, self._at = date, None  # a day that is refused is the one that it came to
        self._at = self._day_run(date)
        self._noted[date] = []
        if self.recipe.window.warm_start:
            self._at.parent = whole_parent(
                self.out, date, self._at.parent, lambda: is_trained(self._day_run(date))
            )
            found = passed_over(self.out, date, self._at.parent)
            self._noted[date] += self.reporter.warn(found)
        return self._at

    def _day_run(self, date: str) -> DayRun:
        return DayRun(
            self.recipe,
            self.out,
            date,
            session=self.session,
            reporter=self.reporter,
            publish=self.publish,
            consent=self.consent,
        )

    def _run(self, date: str) -> Summary:
        day_run = self._day(date)
        directory = self._write_recipe(date)
        records = day_run.execute()
        if records[-1].name == "publish":
            self._promote(date, records[-1].manifest.artifact_id)
        known, noted = read_summary(directory, records), self._noted[date]
        if (
            known is not None
            and (directory / REPORT).exists()
            and all(record.status == "current" for record in records)
        ):
            summary = noted_now(known, records, noted)
        else:
            known, summary = None, summarize(directory, self.recipe.name, records, noted)
        if summary != known:
            write_report(self.recipe, summary, directory)
            write_summary(summary, directory)
        return summary

    def _promote(self, date: str, identity: str) -> None:
        if self.recipe.publish.promote:
            obstacle = promote_newest(self.out, date)
        else:
            obstacle = "publish.promote is false"
        if obstacle is None:
            return
        before = promotions(self.out).is_superseded(identity)
        what = "not promoted again" if before else "published, not promoted"
        remedy = f"`braid models promote --out {self.out} --date {date}` changes that"
        line = f"{what}: {obstacle}; {remedy}"
        self.reporter.line(escape(line))
        if self.recipe.publish.promote and not before:  # else it is as it was meant
            self._noted[date].append(line)

    def _write_recipe(self, date: str) -> Path:
        directory = self.out / date
        directory.mkdir(parents=True, exist_ok=True)
        write_recipe(self.recipe, directory)
        forget_pruned(directory)
        return directory

    def _refused(self, date: str, decision: GateDecision) -> bool:
        """Whether the gate refused the model of a day; says why."""
        for reason in decision.reasons:
            self._refusals.append(f"{date}: {reason}")
            self.reporter.line(f"[red]gate refused {date}[/]: {escape(reason)}")
        return not decision.passed


def is_trained(run: DayRun) -> bool:
    """Whether a run would execute nothing up to its training."""
    stages = STAGES[: STAGES.index("train") + 1]
    return all(spec.is_current for name in stages for spec in run.specs(name))


def _metrics_table(summary: Summary) -> Table:
    table = Table(title=f"{summary.recipe} {summary.date}", title_justify="left", box=SIMPLE)
    names = ["auc", *(["oracle"] if summary.oracle else []), "gauc", "ne", "calib."]
    table.add_column("task")
    table.add_column("slice")
    for column in ("rows", *names):
        table.add_column(column, justify="right")
    for task, metrics in summary.eval.items():
        oracle = summary.oracle.get(task)
        rows: list[tuple[str, SliceMetrics, SliceMetrics | None]] = [("all", metrics, oracle)]
        for name, part in metrics.slices.items():
            rows.append((name, part, oracle.slices.get(name) if oracle else None))
        for name, part, best in rows:
            figures = [part.auc, part.gauc, part.ne, part.calibration]
            if summary.oracle:
                figures.insert(1, best.auc if best else None)
            shown = [figure(value) for value in figures]
            table.add_row(task if name == "all" else "", name, human(part.num_rows), *shown)
    return table


def _progressive_table(summaries: list[Summary]) -> Table:
    table = Table(
        title="progressive validation: trained up to a day, evaluated on the next",
        title_justify="left",
        box=SIMPLE,
    )
    tasks = list(summaries[0].eval)
    for column in ("trained up to", "rows/s", *(f"{task} auc" for task in tasks), "seconds"):
        table.add_column(column, justify="right")
    for summary in summaries:
        seconds = sum(stage.seconds for stage in summary.stages.values())
        table.add_row(
            summary.date,
            human(summary.train.rows_per_s),
            *(figure(summary.eval[task].auc) for task in tasks),
            duration(seconds),
        )
    return table

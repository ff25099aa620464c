"""One day of the pipeline: which artifacts it needs, in which order, from which inputs.

    DIR/<last day of a span>/ingest, join      shared by all runs that need those days
    DIR/<date>/content                         tokens of items, where the recipe has content
    DIR/<date>/align, quantize                 vectors and codes of items, where it has codes
    DIR/<date>/plan, train, evaluate, gate, publish, summary.json, report.html
    DIR/<date>/catch_up                        with `publish.catch_up`

Which spans of days a run needs, and what each continues, `pipeline.spans` says.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from embedding.errors import UserError
from pipeline.artifacts import read_manifest
from pipeline.catalogue_use import CATALOGUE, CODES, CatalogueUse
from pipeline.catch_up import training_to_publish
from pipeline.cluster import ONE_CPU, Bundle, RaySession, rank_bundles, worker_bundle
from pipeline.codes.quantize_stage import codes_of_day
from pipeline.config import Recipe
from pipeline.consent import Consent
from pipeline.console import Reporter
from pipeline.content.paths import ContentPaths
from pipeline.content.stage import STORES, content_stage
from pipeline.days import Span, Split, available_days, require_complete, split_days
from pipeline.evaluate import evaluate
from pipeline.gate import gate
from pipeline.gate_decision import GateDecision
from pipeline.identity import ingest_config, plan_config, publish_config, samples_config
from pipeline.lineage import parent_of
from pipeline.metrics_file import METRICS_FILE
from pipeline.plan import PlanFacts, PlannedCluster, plan, plan_inputs, training_shape
from pipeline.publication import Publish
from pipeline.registry import production_before
from pipeline.rival import EvaluatedRows, rival_of
from pipeline.samples.held_out import require_held_out
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import HELD_OUT, SAMPLES, join
from pipeline.samples.join_facts import unknown_rows
from pipeline.spans import Spans
from pipeline.stages import CATCH_UP, STAGES, StageOutput, StageRecord, StageSpec, execute
from pipeline.train import TrainedModel
from pipeline.train_facts import TrainFacts
from pipeline.training_stages import catch_up_stage, train_stage


class DayRun:
    """Builds and executes the stages of one date. Stages that are current are not run again."""

    def __init__(  # noqa: PLR0913 # what a run is of, and what it works with
        self,
        recipe: Recipe,
        out: Path,
        date: str,
        *,
        session: RaySession,
        reporter: Reporter,
        publish: Publish,
        consent: Consent = Consent(),  # noqa: B008 # frozen
    ) -> None:
        self.recipe = recipe
        self.out = out
        self.date = date
        self.session = session
        self.reporter = reporter
        self.publish = publish
        self.at: str | None = None
        """The stage that `execute` has come to."""
        self._plan_suits = False
        root = recipe.data.root
        require_complete(root, date, recipe.data.complete_marker)
        self.days = available_days(root, recipe.data.complete_marker)
        self.split: Split = split_days(self.days, date, recipe.window)
        self._catalogue = CatalogueUse(root, consent.refresh_catalogue)
        self.spans = Spans(out, root, self.days, ingest_config(recipe), consent, reporter.line)
        self.codes = codes_of_day(recipe, out, self.split, session, reporter)

    def execute(self, until: str = STAGES[-1]) -> list[StageRecord]:
        """Run all stages up to `until`; a gate that refuses ends the run before `publish`."""
        records = []
        for name in STAGES[: STAGES.index(until) + 1]:
            self.at = name
            for spec in self.specs(name):
                records.append(execute(spec, self.reporter))
            if name == "gate" and not self.decision().passed:
                break
        return records

    def decision(self) -> GateDecision:
        """Of the gate, which must have run."""
        decided = read_manifest(self.directory("gate"), GateDecision)
        assert decided is not None
        return decided.facts

    def specs(self, name: str) -> Iterator[StageSpec]:
        """The executions of one stage; the stages before it must have run."""
        return self._catalogue.specs(self._specs(name))

    def _specs(self, name: str) -> Iterator[StageSpec]:
        match name:
            case "ingest":
                yield from map(self._ingest, self._ingested())
            case "content":
                yield from self._content()
            case "align" | "quantize":
                yield from self._codes(name)
            case "train":
                yield train_stage(self)
            case "catch_up":
                if self.recipe.publish.catch_up:
                    yield catch_up_stage(self)
            case "join":
                for span in (*self.training_spans(), *self.evaluation_spans()):
                    yield self._join(span)
            case _:
                single = {
                    "plan": self._plan,
                    "evaluate": self._evaluate,
                    "gate": self._gate,
                    "publish": self._publish,
                }
                yield single[name]()

    def directory(self, stage: str, day: str | None = None) -> Path:
        """Where a stage of a day publishes."""
        return self.out / (day or self.date) / stage

    # --- spans -----------------------------------------------------------------------------------

    def training_spans(self) -> list[Span]:
        """Spans that hold the days this run trains on, oldest first."""
        return self.spans.back_to(self.date, self.training_days()[0])

    def evaluation_spans(self) -> list[Span]:
        """Spans that hold the days after the run's date it evaluates on, oldest first."""
        return self.spans.back_to(self.split.evaluation[-1], self.split.evaluation[0])

    def _ingested(self) -> Iterator[str]:
        """Last days of all spans the run needs and of those they continue, each after its previous.

        Lazy: the spans of the evaluation days continue the one that ends at the run's date, so that
        one must have been ingested first.
        """
        known = set()
        evaluation = self.split.evaluation
        for last, first in ((self.date, self._first_day()), (evaluation[-1], evaluation[0])):
            for day in self.spans.chain(last, first):
                if day not in known:
                    known.add(day)
                    yield day

    def _first_day(self) -> str:
        """First day up to the run's date whose events are needed."""
        aligned = self.codes is not None and self.codes.alignment is not None
        # Pairs of items come from the whole window, whatever the parent has trained on.
        return self.split.train[0] if aligned else self.training_days()[0]

    def training_days(self) -> tuple[str, ...]:
        """Days to train on: those after the last one the parent trained on, or all of the window.

        Raises:
            UserError: The parent has trained on all of them.
        """
        parent = self.parent
        if parent is None:
            return self.split.train
        trained = read_manifest(self.directory("train", parent), TrainFacts)
        assert trained is not None
        last = trained.facts.days[-1]
        days = tuple(d for d in self.split.train if d > last)
        if not days:
            raise UserError(
                f"--date {self.date}: the run of {parent}, which this one starts from, has trained "
                f"on days up to {last}, and window.validation_days="
                f"{self.recipe.window.validation_days} leaves none after it; lower it, or set "
                "window.warm_start=false"
            )
        return days

    @cached_property
    def parent(self) -> str | None:
        """Date of the run whose checkpoint this one starts from (`pipeline.lineage`).

        Asked once: a rollback while the run goes on must not change what its stages work on.
        """
        return parent_of(self.out, self.date) if self.recipe.window.warm_start else None

    # --- stages ----------------------------------------------------------------------------------

    def _ingest(self, last: str) -> StageSpec:
        span = self.spans.span(last)
        previous = None if span.previous is None else self.directory("ingest", span.previous)
        cascade = self.spans.cascade(span)

        def body(scratch: Path) -> StageOutput:
            warnings = self.reporter.warn(cascade)
            read = self.spans.known_days.files
            checked = check_span(self.recipe, span.days, previous, read)  # before Ray starts
            self.session.wait_for("ingest", [ONE_CPU])
            facts = ingest(self.recipe, checked, scratch, self.reporter.advance)
            return StageOutput(facts.rows_in, facts.rows_out, facts, facts.quarantined, warnings)

        config = ingest_config(self.recipe)
        inputs = self.spans.inputs(span, self._catalogue.fingerprint())
        events = None if "events" in inputs else partial(self.spans.events, span)
        directory = self.directory("ingest", last)
        return StageSpec("ingest", directory, config, inputs, body, more_inputs=events)

    def _content(self) -> Iterator[StageSpec]:
        if self.recipe.content is not None:
            at = self.directory("content")
            catalogue = self._catalogue.fingerprint()
            yield content_stage(self.recipe, at, catalogue, self.session, self.reporter)

    def _codes(self, name: str) -> Iterator[StageSpec]:
        if self.codes is not None:
            days = self.spans.chain(self.date, self._first_day())
            ingests = tuple(self.directory("ingest", last) for last in days)
            catalogue = self._catalogue.fingerprint()
            yield from self.codes.specs(name, catalogue, ingests, self.parent)

    def _join(self, span: Span) -> StageSpec:
        last = span.days[-1]
        inputs = {"ingest": self.artifact_id("ingest", last)}
        inputs[CATALOGUE] = self._catalogue.fingerprint()
        codes = None if self.codes is None else self.codes.file
        if self.codes is not None:
            inputs |= {CODES: self.codes.fingerprint, "codebooks": self.codes.codebooks or ""}

        def body(scratch: Path) -> StageOutput:
            self.session.wait_for("join", [ONE_CPU])
            facts = join(
                self.recipe, self.directory("ingest", last), scratch, self.reporter.advance, codes
            )
            warnings = self.reporter.warn(unknown_rows(self.recipe, facts))
            return StageOutput(facts.rows, facts.rows, facts, warnings=warnings)

        return StageSpec(
            "join", self.directory("join", last), samples_config(self.recipe), inputs, body
        )

    def _plan(self) -> StageSpec:
        def body(scratch: Path) -> StageOutput:
            self.session.wait_for("plan", [worker_bundle(self.recipe.cluster)])
            self._plan_suits = True
            return plan(self.recipe, scratch)

        return StageSpec(
            "plan", self.directory("plan"), plan_config(self.recipe), plan_inputs(self.recipe), body
        )

    def _evaluate(self) -> StageSpec:
        days = self.evaluation_days()
        inputs = {
            "train": self.artifact_id("train", self.date),
            "join": self.artifact_id("join", days[-1]),
            "ingest": self.artifact_id("ingest", self.date),
        }
        spans = self.evaluation_spans()[:-1]
        if days != self.split.evaluation:
            spans = self.training_spans() + spans
        for span in spans:
            inputs[f"join:{span.days[-1]}"] = self.artifact_id("join", span.days[-1])
        config = {"evaluation": self._dump("evaluation"), "days": days}

        def body(scratch: Path) -> StageOutput:
            self.wait_for_ranks("evaluate", rank_bundles(self.recipe.cluster))
            return evaluate(
                TrainedModel.of(self.recipe, self.directory("train"), self.content_paths()),
                samples=self.evaluation_samples(),
                counts=self.directory("ingest"),
                scratch=scratch,
            )

        return StageSpec("evaluate", self.directory("evaluate"), config, inputs, body)

    def _gate(self) -> StageSpec:
        current = production_before(self.out, self.date)
        inputs = {
            "evaluate": self.artifact_id("evaluate", self.date),
            "production": "" if current is None else current.manifest.artifact_id,
        }

        def body(scratch: Path) -> StageOutput:
            rival = None
            if current is not None:
                rows = EvaluatedRows(
                    run=self.out / self.date,
                    days=self.evaluation_days(),
                    samples=self.evaluation_samples,
                    content=self.content_paths(),
                )
                wait = partial(self.session.wait_for, "gate", rank_bundles(self.recipe.cluster))
                rival = rival_of(self.recipe, current, rows, scratch, wait)
            output = gate(self.recipe, self.directory("evaluate"), rival, scratch)
            self.reporter.warn(output.warnings)
            return output

        return StageSpec("gate", self.directory("gate"), self._dump("gate"), inputs, body)

    def _publish(self) -> StageSpec:
        inputs = {
            "train": self.artifact_id("train", self.date),
            "gate": self.artifact_id("gate", self.date),
        }
        if self.recipe.publish.catch_up:
            inputs[CATCH_UP] = self.artifact_id(CATCH_UP, self.date)

        def body(scratch: Path) -> StageOutput:
            training = self.directory("train")
            if self.recipe.publish.catch_up:
                training = training_to_publish(training.parent)
            output = self.publish(self.recipe, training, scratch)
            # What later gates compare with belongs to the bundle.
            shutil.copyfile(self.directory("evaluate") / METRICS_FILE, scratch / METRICS_FILE)
            return output

        return StageSpec(
            "publish", self.directory("publish"), publish_config(self.recipe), inputs, body
        )

    # --- pieces ----------------------------------------------------------------------------------

    def wait_for_ranks(self, stage: str, bundles: Sequence[Bundle]) -> None:
        """Wait for what a stage on the ranks needs, and plan again if the cluster is another.

        What a plan's identity leaves out: hosts, their ranks and memory. Whoever has nothing to
        run needs no cluster, and nothing that is trained depends on them.

        Raises:
            UserError: it was not free in time, or no plan fits.
        """
        self.session.wait_for(stage, bundles)
        planned = read_manifest(self.directory("plan"), PlanFacts)
        if self._plan_suits or planned is None:
            return
        here = training_shape(self.recipe)
        if not planned.facts.cluster.is_like(PlannedCluster.of(here)):
            self.reporter.line(
                f"  the plan was made for another cluster than {here.name} with the memory it has; "
                "it is made again"
            )
            execute(self._plan(), self.reporter, anew=True)
        self._plan_suits = True

    def evaluation_days(self) -> tuple[str, ...]:
        """Days whose rows are evaluated."""
        held_out = self.recipe.evaluation.held_out_items
        if held_out is None or held_out.days == "evaluation":
            return self.split.evaluation
        return (*self.training_days(), *self.split.validation, *self.split.evaluation)

    def evaluation_samples(self) -> list[Path]:
        """Files of what is evaluated: held-out items, where there are, else all."""
        if self.recipe.evaluation.held_out_items is None:
            return self.samples(self.split.evaluation)
        return require_held_out(self.samples(self.evaluation_days(), HELD_OUT))

    def content_paths(self) -> ContentPaths | None:
        """Where the run's item content lies, if its recipe has any."""
        if self.recipe.content is None:
            return None
        return ContentPaths(index=self.directory("content"), stores=self.out / STORES)

    def samples(self, days: tuple[str, ...], part: str = SAMPLES) -> list[Path]:
        """Sample files of these days, from whichever spans hold them."""
        # A span of evaluation days may begin before the run's date: training days are taken once.
        spans = (*self.evaluation_spans(), *self.training_spans())
        holds = {day: span.days[-1] for span in spans for day in span.days}
        assert set(days) <= set(holds), (days, sorted(holds))
        return [
            path
            for day in days
            for path in sorted(
                (self.directory("join", holds[day]) / part / f"dt={day}").glob("*.parquet")
            )
        ]

    def _dump(self, part: str) -> dict[str, Any]:
        dumped: dict[str, Any] = getattr(self.recipe, part).model_dump(mode="json")
        return dumped

    def artifact_id(self, stage: str, day: str) -> str:
        """Of what a stage of a day has published; empty where there is nothing."""
        manifest = read_manifest(self.directory(stage, day))
        return "" if manifest is None else manifest.artifact_id

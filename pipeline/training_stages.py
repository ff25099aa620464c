"""The stages of a run that train: `train`, and `catch_up` with `publish.catch_up`.

`train` makes the model that is evaluated, on the days up to the run's date. `catch_up` goes on from
it, once its gate has passed, on the days that it was evaluated on, so that what is published knows
the newest day (`pipeline.catch_up`). The next run trains on the same days from the same model, and
takes that result over.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import Manifest, config_hash, damaged_files, read_manifest
from pipeline.catch_up import objections
from pipeline.cluster import rank_bundles
from pipeline.day_warnings import Ancestry, day_warnings
from pipeline.days import Span
from pipeline.evaluate import PREDICTIONS, evaluate
from pipeline.identity import training_config
from pipeline.lineage import learned_days, trained_codebooks, unlearned
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.registry import was_withdrawn
from pipeline.samples.columns import ColumnKind
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.stages import CATCH_UP, StageOutput, StageSpec
from pipeline.train import TrainedModel, TrainInputs, take_over, train
from pipeline.train_facts import CatchUpFacts, TrainFacts
from ranking.task_metrics import TaskMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.run import DayRun


def train_stage(run: "DayRun") -> StageSpec:
    """The model of the run's date."""
    parent, days = run.parent, run.training_days()
    config = _config(run, days, run.split.validation)
    spans = run.training_spans()
    inputs = _inputs(run, spans)
    if parent is not None:
        inputs["parent"] = run.artifact_id("train", parent)

    def body(scratch: Path) -> StageOutput:
        known, ancestry = run.spans.known_days, Ancestry.of(run.out, parent)
        kept = run.spans.kept(run.date)
        left = {day for changed in kept.values() for day in changed}
        late = day_warnings(known, run.split, days, ancestry, left)
        warnings = run.reporter.warn([*late, *kept])
        codebooks, event_columns = _about_samples(run)
        learned, files, taken_over = days, run.spans.files_of(spans, days), None
        earlier = None if parent is None else run.directory(CATCH_UP, parent)
        caught_up = None if earlier is None else _same_training(earlier, config, inputs)
        if earlier is not None and caught_up is not None and _is_approved(run.out, caught_up):
            run.reporter.line(f"  trained when the run of {parent} caught up; nothing is left")
            result = take_over(earlier, scratch)
            taken_over = caught_up.artifact_id
        else:
            run.wait_for_ranks("train", run.session.group())
            start = None if parent is None else run.directory("train", parent)
            change = None
            if run.codes is not None and start is not None:
                change = run.codes.change_since(trained_codebooks(start))
            sources = TrainInputs(
                samples=run.samples(days),
                validation=run.samples(run.split.validation),
                plan=run.directory("plan"),
                parent=start,
                content=run.content_paths(),
                codebooks=change,
            )
            result = train(run.recipe, sources, scratch, run.reporter)
            if start is not None and parent is not None and result.best_step == 0:
                learned, files = learned_days(start)
                warnings += run.reporter.warn([unlearned(days, parent)])
        facts = TrainFacts(
            result=result,
            days=learned,
            codebooks=codebooks,
            event_columns=event_columns,
            parent=parent,
            day_files=files,
            caught_up=taken_over,
        )
        return StageOutput(result.rows, result.rows, facts, warnings=warnings)

    return StageSpec(
        "train",
        run.directory("train"),
        config,
        inputs,
        body,
        # Checkpoints load into any plan: training goes on after the cluster has changed.
        resume_without=frozenset({"plan"}),
    )


def catch_up_stage(run: "DayRun") -> StageSpec:
    """The same model, trained on the days that it has been judged by."""
    days = run.split.evaluation
    config, inputs = _config(run, days, ()), _inputs(run, run.evaluation_spans())
    inputs["train"] = run.artifact_id("train", run.date)
    judged_by = {"gate": run.artifact_id("gate", run.date)}

    def body(scratch: Path) -> StageOutput:
        own = run.directory(CATCH_UP)
        codebooks, event_columns = _about_samples(run)
        if _same_training(own, config, inputs) is not None:  # only the gate is another
            result = take_over(own, scratch)
        else:
            run.wait_for_ranks(CATCH_UP, run.session.group())
            sources = TrainInputs(
                samples=run.samples(days),
                validation=[],
                plan=run.directory("plan"),
                parent=run.directory("train"),
                content=run.content_paths(),
            )
            result = train(run.recipe, sources, scratch, run.reporter)
        before = read_metrics(run.directory("evaluate") / METRICS_FILE)
        reasons = objections(run.recipe.gate, before, _on_the_same_rows(run, scratch))
        warnings: tuple[str, ...] = ()
        if reasons:
            warnings = (
                f"catch_up is not published, but the model of {run.date} as its gate passed it: "
                f"{'; '.join(reasons)}",
            )
        run.reporter.warn(warnings)
        facts = CatchUpFacts(
            result=result,
            days=days,
            codebooks=codebooks,
            event_columns=event_columns,
            accepted=not reasons,
            reasons=reasons,
        )
        return StageOutput(result.rows, result.rows, facts, warnings=warnings)

    return StageSpec(
        CATCH_UP,
        run.directory(CATCH_UP),
        config,
        {**inputs, **judged_by},
        body,
        resume_without=frozenset({"plan", *judged_by}),
    )


def _about_samples(run: "DayRun") -> tuple[str | None, dict[str, ColumnKind]]:
    """What whoever makes samples for this model elsewhere must know: codebooks, event columns."""
    ingested = read_manifest(run.directory("ingest"), IngestFacts)
    assert ingested is not None
    codebooks = None if run.codes is None else run.codes.codebooks
    return codebooks, ingested.facts.event_columns


def _on_the_same_rows(run: "DayRun", trained: Path) -> dict[str, TaskMetrics]:
    """Metrics of a training in a directory on what the run's model was evaluated on."""
    run.wait_for_ranks(CATCH_UP, rank_bundles(run.recipe.cluster))
    judged = trained / "evaluation"
    judged.mkdir()
    evaluate(
        TrainedModel.of(run.recipe, trained, run.content_paths()),
        samples=run.evaluation_samples(),
        counts=run.directory("ingest"),
        scratch=judged,
    )
    shutil.rmtree(judged / PREDICTIONS)
    return read_metrics(judged / METRICS_FILE)


def _config(run: "DayRun", days: "Sequence[str]", validation: "Sequence[str]") -> dict[str, Any]:
    return {**training_config(run.recipe), "days": days, "validation_days": validation}


def _inputs(run: "DayRun", spans: list[Span]) -> dict[str, str]:
    """Artifacts that a training reads, but for the model it goes on from."""
    inputs = {"plan": run.artifact_id("plan", run.date)}
    if run.recipe.content is not None:
        inputs["content"] = run.artifact_id("content", run.date)
    for span in spans:
        inputs[f"join:{span.days[-1]}"] = run.artifact_id("join", span.days[-1])
    return inputs


def _same_training(
    earlier: Path, config: dict[str, Any], inputs: dict[str, str]
) -> Manifest[CatchUpFacts] | None:
    """A `catch_up` that is exactly the training of these inputs, and whole; None: it is not.

    Whatever plan it ran with: where shards lie changes nothing of what is learned.
    """
    found = read_manifest(earlier, CatchUpFacts)
    if found is None or found.config_hash != config_hash(config):
        return None
    theirs = {key: value for key, value in found.inputs.items() if key not in ("gate", "plan")}
    ours = {("train" if k == "parent" else k): value for k, value in inputs.items() if k != "plan"}
    return found if theirs == ours and not damaged_files(earlier, thorough=False) else None


def _is_approved(out: Path, caught_up: Manifest[CatchUpFacts]) -> bool:
    """Whether it was accepted, and its bundle has not been withdrawn."""
    withdrawn = was_withdrawn(out, CATCH_UP, caught_up.artifact_id)
    return caught_up.facts.accepted and not withdrawn

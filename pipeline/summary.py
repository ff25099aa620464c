"""`summary.json`: the figures of one run, in a documented, versioned shape."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from embedding.config import StrictConfig
from embedding.files import write_durably
from pipeline.artifacts import read_manifest
from pipeline.gate_decision import GateDecision
from pipeline.metrics_file import METRICS_FILE, ORACLE_FILE, read_metrics
from pipeline.registry import bundle_of_run
from pipeline.spans import INGEST
from pipeline.stages import CATCH_UP, StageRecord
from pipeline.train_facts import CatchUpFacts, TrainFacts
from ranking.task_metrics import TaskMetrics

SUMMARY = "summary.json"


class StageSummary(StrictConfig):
    """One stage of the run."""

    status: str
    """`ran`, `current` (its artifact was up to date) or `refused` (a gate that did not pass)."""
    seconds: float
    """Of the execution that made the artifact, in this run or an earlier one."""
    rows_in: int
    rows_out: int


class TrainSummary(StrictConfig):
    """The training of the run."""

    rows_per_s: float
    """Global, real rows."""
    steps: int
    world_size: int
    data_wait_share: float
    """Share of the training loop's time spent waiting for data."""
    best_step: int | None
    """Step of the published weights, chosen by validation; None: the last one."""
    stopped_early: bool
    """Whether validation ended the training before its last epoch."""


class CatchUpSummary(StrictConfig):
    """The training on the days that the model was evaluated on (`publish.catch_up`)."""

    days: tuple[str, ...]
    accepted: bool
    """Whether its result is what was published; else that of `train` was."""
    reasons: tuple[str, ...]
    """Why not."""


class Summary(StrictConfig):
    """Everything a script needs to know of a run; version 1."""

    schema_version: Literal[1] = 1
    date: str
    recipe: str
    run_id: str
    """Artifact id of the training: equal ids mean equal models."""
    stages: dict[str, StageSummary]
    train: TrainSummary
    eval: dict[str, TaskMetrics]
    oracle: dict[str, TaskMetrics] = Field(default_factory=dict)
    """Metrics of the true probability; synthetic data only."""
    gate: GateDecision
    catch_up: CatchUpSummary | None = None
    """None without `publish.catch_up`, and where the gate refused."""
    bundle: str | None
    """Path of the published bundle, of the copy that never changes where it was promoted; None when
    the gate refused."""
    warnings: list[str] = Field(default_factory=list)
    """Sentences on what the run did not stop for, but somebody should look at."""
    artifacts: dict[str, str] = Field(default_factory=dict)
    """Artifact ids of the run's own stages, by stage: whose figures these are."""


def summarize(
    directory: Path, recipe: str, records: list[StageRecord], noted: Sequence[str] = ()
) -> Summary:
    """Collect a finished run's figures from its artifacts.

    Args:
        directory: of the run.
        recipe: its name.
        records: of its stages.
        noted: warnings of the run that are of no stage.
    """
    train = read_manifest(directory / "train", TrainFacts)
    gate = read_manifest(directory / "gate", GateDecision)
    assert train is not None
    assert gate is not None
    published = bundle_of_run(directory.parent, directory.name) if gate.facts.passed else None
    names = {record.name for record in records}
    return Summary(
        date=directory.name,
        recipe=recipe,
        run_id=train.artifact_id,
        stages=_stages(records, refused=not gate.facts.passed),
        train=TrainSummary.model_validate(train.facts.result, from_attributes=True),
        eval=read_metrics(directory / "evaluate" / METRICS_FILE),
        oracle=read_metrics(directory / "evaluate" / ORACLE_FILE),
        gate=gate.facts,
        catch_up=_caught_up(directory) if CATCH_UP in names else None,
        bundle=None if published is None else str(published),
        warnings=[*warnings_of(records), *noted],
        artifacts=_artifacts(records),
    )


def _caught_up(directory: Path) -> CatchUpSummary:
    manifest = read_manifest(directory / CATCH_UP, CatchUpFacts)
    assert manifest is not None
    return CatchUpSummary.model_validate(manifest.facts, from_attributes=True)


def read_summary(directory: Path, records: list[StageRecord]) -> Summary | None:
    """The `summary.json` of exactly these artifacts; None where there is another one, or none."""
    path = directory / SUMMARY
    if not path.exists():
        return None
    try:
        summary = Summary.model_validate_json(path.read_text())
    except ValidationError:  # of another version
        return None
    if summary.bundle is not None and (
        summary.bundle != str(bundle_of_run(directory.parent, directory.name))
    ):
        return None  # promoted since
    return summary if summary.artifacts == _artifacts(records) else None


def warnings_of(records: list[StageRecord]) -> list[str]:
    """In the order of the stages; what ingest said once is not said again every day."""
    found: list[str] = []
    for record in records:
        if record.name != INGEST or record.status == "ran":
            found += record.manifest.warnings
    return list(dict.fromkeys(found))


def noted_now(summary: Summary, records: list[StageRecord], noted: Sequence[str]) -> Summary:
    """The summary of a run whose stages are current, with the warnings that are of no stage now."""
    of_stages = {sentence for record in records for sentence in record.manifest.warnings}
    kept = [sentence for sentence in summary.warnings if sentence in of_stages]
    return summary.model_copy(update={"warnings": [*kept, *noted]})


def _artifacts(records: list[StageRecord]) -> dict[str, str]:
    ids = {record.name: record.manifest.artifact_id for record in records}
    own = ("train", "evaluate", "gate", CATCH_UP, "publish")
    return {name: ids[name] for name in own if name in ids}


def _stages(records: list[StageRecord], *, refused: bool) -> dict[str, StageSummary]:
    """Executions of the same stage (one per span of days) added up."""
    stages: dict[str, StageSummary] = {}
    for record in records:
        before = stages.get(record.name)
        status = record.status
        if record.name == "gate" and refused:
            status = "refused"
        elif before is not None and before.status == "ran":
            status = "ran"
        stages[record.name] = StageSummary(
            status=status,
            seconds=record.manifest.seconds + (before.seconds if before else 0),
            rows_in=record.manifest.rows_in + (before.rows_in if before else 0),
            rows_out=record.manifest.rows_out + (before.rows_out if before else 0),
        )
    return stages


def write_summary(summary: Summary, directory: Path) -> Path:
    """Write `summary.json` in one move."""
    write_durably(directory / SUMMARY, summary.model_dump_json(indent=2))
    return directory / SUMMARY

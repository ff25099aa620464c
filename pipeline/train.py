"""The train stage: a Ray Train worker group over the plan, followed line by line.

Reads sample files, `plan.json` and the parent's checkpoint; writes `checkpoint/`, `recipe.yaml`,
`metrics.jsonl`, `tensorboard/`, `logs/` and `result.json`. While it runs all of it lies in
`resume/`, which outlives crashes of workers and of the driver.
"""

import shutil
from pathlib import Path
from typing import Self

from embedding.config import StrictConfig
from embedding.files import link_or_copy
from pipeline.artifacts import RESUME
from pipeline.config import Recipe
from pipeline.console import Reporter
from pipeline.content.paths import ContentPaths
from pipeline.follow import MetricsFollower
from pipeline.plan import PLAN
from pipeline.recipe import RECIPE_FILE, write_recipe
from pipeline.refusal import REFUSAL, refusing_once
from pipeline.reports.warm_start_view import warm_start_line
from pipeline.train_facts import TrainResult
from pipeline.worker_group import RunWorkers, run_workers

CHECKPOINT = "checkpoint"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
RESULT = "result.json"
LOGS = "logs"
RECORDS = (METRICS, TENSORBOARD, RESULT, LOGS)
"""What an artifact keeps of its training beside the checkpoint."""


class CodebookChange(StrictConfig):
    """Codebooks of the parent's code tables, and of this run's samples."""

    root: Path
    """Of all versions."""
    before: str
    after: str


class TrainInputs(StrictConfig):
    """What a training reads."""

    samples: list[Path]
    validation: list[Path]
    """Held-out samples; empty without `window.validation_days`."""
    plan: Path
    """Directory of the plan artifact."""
    parent: Path | None
    """Directory of the train artifact to start from."""
    content: ContentPaths | None = None
    """Where the recipe has content."""
    codebooks: CodebookChange | None = None
    """Where the parent's code tables belong to other codebooks than the samples."""

    @property
    def plan_file(self) -> Path:
        """The sharding plan."""
        return self.plan / PLAN

    @property
    def parent_checkpoint(self) -> Path | None:
        """What to start from."""
        return None if self.parent is None else self.parent / CHECKPOINT

    def absolute(self) -> "TrainInputs":
        """The same for a process with another working directory."""
        return TrainInputs(
            samples=[path.absolute() for path in self.samples],
            validation=[path.absolute() for path in self.validation],
            plan=self.plan.absolute(),
            parent=None if self.parent is None else self.parent.absolute(),
            content=None if self.content is None else self.content.absolute(),
            codebooks=self.codebooks,
        )


class TrainedModel(StrictConfig):
    """A finished training, as the worker groups that read it need it."""

    recipe: Recipe
    plan: Path
    checkpoint: Path
    content: ContentPaths | None = None
    """Where the recipe has content."""

    @classmethod
    def of(cls, recipe: Recipe, directory: Path, content: ContentPaths | None) -> Self:
        """The model of a train artifact, whose plan lies beside it."""
        return cls(
            recipe=recipe,
            plan=(directory.parent / "plan" / PLAN).absolute(),
            checkpoint=(directory / CHECKPOINT).absolute(),
            content=None if content is None else content.absolute(),
        )


class TrainJob(StrictConfig):
    """All a worker needs to know; crosses to it as JSON."""

    recipe: Recipe
    inputs: TrainInputs
    resume: Path
    """Where everything lies while the training runs."""

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of this training, by step."""
        return self.resume / "checkpoints"


def train(
    recipe: Recipe,
    inputs: TrainInputs,
    scratch: Path,
    reporter: Reporter,
    run: RunWorkers = run_workers,
) -> TrainResult:
    """Train on the cluster; a dead worker restarts the group from the last checkpoint."""
    job = TrainJob(recipe=recipe, inputs=inputs.absolute(), resume=(scratch / RESUME).absolute())
    # The result is a training's last word: with it, only the publishing was interrupted.
    if not (job.resume / RESULT).exists():
        (job.resume / REFUSAL).unlink(missing_ok=True)
        with MetricsFollower(job.resume / METRICS, reporter):
            run(_train_worker, job, recipe.cluster, scratch)
    result = _result(job.resume)
    for name in RECORDS:
        _link(job.resume / name, scratch / name)
    _link(job.checkpoints / result.checkpoint, scratch / CHECKPOINT / result.checkpoint)
    write_recipe(recipe, scratch)
    if inputs.parent is not None and result.warm_start is not None:
        reporter.line(f"  {warm_start_line(result.warm_start, inputs.parent.parent.name)}")
    return result


def take_over(earlier: Path, scratch: Path) -> TrainResult:
    """The result of an artifact of the same training, instead of training once more."""
    for name in (*RECORDS, CHECKPOINT, RECIPE_FILE):
        _link(earlier / name, scratch / name)
    return _result(earlier)


def _result(directory: Path) -> TrainResult:
    return TrainResult.model_validate_json((directory / RESULT).read_text())


def _train_worker(config: dict[str, str]) -> None:
    """Runs on every rank; torchrec is imported here and not in the driver."""
    from pipeline.training_worker import train_worker

    job = TrainJob.model_validate_json(config["job"])
    with refusing_once(job.resume):
        train_worker(job)


def _link(source: Path, target: Path) -> None:
    """The same files under a second name, so that a crash before publishing loses nothing."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy)
    else:
        link_or_copy(source, target)

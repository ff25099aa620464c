"""One trial of a study: plan, train and evaluate one variant with one seed, like a day's stages.

Small trials run inside a process that is kept for the next one, so that imports and the process
group are paid for once; trials of several ranks run on a Ray Train worker group each.
"""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from embedding.config import StrictConfig
from pipeline.config import ClusterConfig, Recipe
from pipeline.console import Reporter
from pipeline.content.paths import ContentPaths
from pipeline.evaluate import evaluate
from pipeline.plan import plan, write_plan
from pipeline.stages import StageOutput
from pipeline.train import METRICS, RESULT, TrainedModel, TrainInputs, train
from pipeline.worker_group import RunWorkers, Worker, run_workers


class TrialJob(StrictConfig):
    """All that a trial needs to know."""

    recipe: Recipe
    """With the variant's overrides and the seed."""
    samples: list[Path]
    validation: list[Path]
    """Sample files of the days held out for validation; may be empty."""
    evaluation: list[Path]
    """Sample files of the evaluation days."""
    counts: Path
    """Ingest artifact with the event counts that slices need."""
    scratch: Path
    content: ContentPaths | None = None
    """Where the recipe has content."""


def run_on_group(job: TrialJob) -> StageOutput:
    """The trial on a worker group of the cluster; needs an initialised Ray."""
    return _run(job, lambda scratch: plan(job.recipe, scratch), run_workers)


class TrialProcess:
    """Runs trials of one rank, one after the other; a Ray actor."""

    def warm_up(self, use_gpu: bool, has_content: bool) -> None:
        """Import what trials import, and start device and process group.

        Else the first trial's time would hold it, and the first variant's mean.
        """
        modules = ["pipeline.planning_worker", "pipeline.training_worker"]
        for name in (*modules, *(["pipeline.content.training"] if has_content else [])):
            importlib.import_module(name)
        self._join_group(use_gpu)
        if use_gpu:
            import torch

            from pipeline.devices import own_device

            torch.zeros(1, device=own_device())

    def run(self, text: str) -> StageOutput:
        """The trial of a `TrialJob` as JSON."""
        job = TrialJob.model_validate_json(text)
        return _run(job, lambda scratch: self._plan(job.recipe, scratch), self._run_here)

    def _plan(self, recipe: Recipe, scratch: Path) -> None:
        from pipeline.planning_worker import plan_recipe

        write_plan(plan_recipe(recipe, ranks_per_host=1), scratch)

    def _run_here(
        self, worker: Worker, job: StrictConfig, cluster: ClusterConfig, scratch: Path
    ) -> None:
        self._join_group(cluster.use_gpu)
        worker({"job": job.model_dump_json()})

    def _join_group(self, use_gpu: bool) -> None:
        """A group of this process alone, which all of its trials use."""
        import torch.distributed as dist

        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
            dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _run(job: TrialJob, make_plan: Callable[[Path], object], run: RunWorkers) -> StageOutput:
    """Leaves `metrics.json`, `oracle.json`, `metrics.jsonl` and `result.json` in the scratch."""
    folders = [job.scratch / name for name in ("plan", "train", "evaluate")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    plan_dir, train_dir, evaluate_dir = folders
    make_plan(plan_dir)
    inputs = TrainInputs(
        samples=job.samples,
        validation=job.validation,
        plan=plan_dir,
        parent=None,
        content=job.content,
    )
    trained = train(job.recipe, inputs, train_dir, Reporter(Console(quiet=True)), run)
    evaluate(
        TrainedModel.of(job.recipe, train_dir, job.content),
        samples=job.evaluation,
        counts=job.counts,
        scratch=evaluate_dir,
        run=run,
    )
    for path in (*evaluate_dir.glob("*.json"), train_dir / METRICS, train_dir / RESULT):
        path.replace(job.scratch / path.name)
    for folder in folders:
        shutil.rmtree(folder)
    return StageOutput(trained.rows, trained.rows, trained)

"""What runs on every rank of the training group. Torch and torchrec are imported here.

Ray Train has set up the process group; a restarted group finds its last checkpoint in `resume/`.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch.utils.tensorboard.writer import SummaryWriter

from embedding import samples as columns
from embedding.checkpoint import Checkpointer, load_into
from embedding.checkpoint_files import BUFFERS, COMPANION, step_directory
from embedding.errors import CheckpointError
from embedding.files import write_durably
from embedding.loader import SampleFiles, SampleLoader
from embedding.memory import keep_freed_memory
from embedding.notices import divert_library_notices
from embedding.planning.plan_description import PlanDescription
from embedding.shard import Sharded, shard
from embedding.warm_start_report import WarmStartReport
from pipeline.config import Recipe
from pipeline.content.paths import ContentPaths
from pipeline.days import run_command
from pipeline.devices import own_device
from pipeline.evaluate import EvaluateJob
from pipeline.rank_hosts import check_hosts
from pipeline.train import LOGS, METRICS, RESULT, TENSORBOARD, TrainJob
from pipeline.train_facts import TrainResult
from ranking.averaging import AVERAGE, saved_average
from ranking.content import PENALTY
from ranking.model import RankingModel, RankingStep
from ranking.prediction import Predictions, predict
from ranking.progress import Progress
from ranking.step_line import step_line
from ranking.trainer import Reached, Trainer, TrainingHooks
from ranking.validation import validation_line

if TYPE_CHECKING:
    from pipeline.content.training import RankContent

logger = logging.getLogger(__name__)

WARM_START = "warm_start.json"
"""In `resume/`: what came from the parent."""


def train_worker(job: TrainJob) -> None:
    """Train on this rank from the last checkpoint, the parent's, or the start."""
    device = _prepare_process(job.recipe, job.resume / LOGS)
    check_hosts(job.inputs.plan_file, device)
    with _rank_content(job.recipe, job.inputs.content, device) as content:
        _train(job, content, device)
    dist.barrier()


def _train(job: TrainJob, content: "RankContent | None", device: torch.device) -> None:
    recipe = job.recipe
    sharded = build(recipe, job.inputs.plan_file, device, content)
    loader = _loader(recipe, job.inputs.samples, content)
    held_out = _loader(recipe, job.inputs.validation, content) if job.inputs.validation else None
    keep = recipe.ranking.trainer.keep_checkpoints
    with ExitStack() as open_until_done:
        checkpointer = open_until_done.enter_context(Checkpointer(job.checkpoints, keep=keep))
        progress, carried = _restore(job, sharded, checkpointer)
        record = None
        if dist.get_rank() == 0:
            record = open_until_done.enter_context(closing(MetricsFile(job, progress.step)))
        trainer = Trainer(
            recipe.ranking.trainer,
            recipe.ranking.tasks,
            model=sharded.model,
            optimizer=sharded.optimizer,
            device=device,
            hooks=TrainingHooks(
                report=record.add if record else _ignore,
                save=lambda reached: checkpointer.save(
                    reached.step,
                    sharded,
                    reached.state_dict(dist.get_rank()),
                    wait=False,
                    retain=reached.validation.best_step,
                ),
                validated=record.add_validation if record else _ignore,
            ),
        )
        summary = trainer.fit(
            loader, progress, validation=held_out, is_warm_start=carried is not None
        )
    if record is not None:
        best_step = summary.validation.best_step
        result_step = summary.steps if best_step is None else best_step
        result = TrainResult(
            checkpoint=step_directory(job.checkpoints, result_step).name,
            rows=loader.rows_before(summary.position),
            steps=summary.steps,
            best_step=best_step,
            stopped_early=summary.stopped_early,
            rows_per_s=summary.totals.rows_per_s,
            world_size=summary.world_size,
            data_wait_share=summary.totals.data_wait_share,
            warm_start=carried,
            content=record.content,
        )
        write_durably(job.resume / RESULT, result.model_dump_json(indent=2))


def predict_worker(job: EvaluateJob) -> None:
    """Predict this rank's consecutive share of the samples into `rank-N.parquet`."""
    recipe = job.model.recipe
    device = _prepare_process(recipe, job.predictions.parent / LOGS)
    check_hosts(job.model.plan, device)
    with _rank_content(recipe, job.model.content, device, predicts=True) as content:
        _predict(job, content, device)
    dist.barrier()


def _predict(job: EvaluateJob, content: "RankContent | None", device: torch.device) -> None:
    recipe = job.model.recipe
    sharded = build(recipe, job.model.plan, device, content)
    report = load_into(job.model.checkpoint, sharded)
    # The bank is no weight: it holds what the encoder gives.
    lacking = sorted({*report.initialised} - {f"{COMPANION}bank"})
    if lacking:
        raise CheckpointError(
            f"the checkpoint {job.model.checkpoint} is not of this model: {lacking[0]} "
            f"({report.initialised[lacking[0]]}) and {len(lacking) - 1} others would keep their "
            "start values; run the train stage again"
        )
    if content is not None:
        content.source.refresh()
    step: RankingStep = sharded.model.module
    step.install_average()
    tasks = [task.name for task in recipe.ranking.tasks]
    path = job.predictions / f"rank-{dist.get_rank():05d}.parquet"
    with (
        pq.ParquetWriter(path, prediction_schema(tasks)) as writer,
        _loader(recipe, job.samples, content).sequential() as stream,
    ):
        for predictions in predict(sharded.model, stream, device):
            writer.write_batch(prediction_batch(predictions, tasks))


def build(
    recipe: Recipe, plan: Path, device: torch.device, content: "RankContent | None" = None
) -> Sharded:
    """The recipe's model, sharded by the plan, with start values drawn from the seed."""
    trainer = recipe.ranking.trainer
    model = RankingModel(
        recipe.features,
        recipe.ranking,
        tables_device=torch.device("meta"),
        content=None if content is None else content.shape,
    )
    adam = trainer.dense_optimizer
    sharded = shard(
        RankingStep(
            model,
            recipe.ranking,
            embedding_l2=recipe.embedding.l2,
            content=None if content is None else content.part,
        ),
        optimizer=recipe.embedding.optimizer,
        sharding=recipe.embedding.sharding,
        dense_optimizer=lambda parameters: torch.optim.AdamW(
            parameters,
            lr=adam.learning_rate,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        ),
        device=device,
        plan=PlanDescription.model_validate_json(plan.read_text()),
    )
    sharded.initialize(trainer.seed)
    return sharded if content is None else replace(sharded, companion=content.source)


def _restore(
    job: TrainJob, sharded: Sharded, checkpointer: Checkpointer
) -> tuple[Progress, WarmStartReport | None]:
    """Go on from this training's last checkpoint, else start, if possible from the parent.

    What came from the parent is written down when it comes, for a restart no longer sees it.
    """
    record = job.resume / WARM_START
    found = checkpointer.load_latest(sharded)
    if found is not None:
        step, progress = found
        logger.info("rank %d goes on at step %d", dist.get_rank(), step)
        report = None
        if record.exists():
            report = WarmStartReport.model_validate_json(record.read_text())
        return Progress.from_state_dict(progress), report
    if job.inputs.parent_checkpoint is None:
        return Progress(), None
    carries = None
    if job.inputs.codebooks is not None:
        from pipeline.codes.carry import row_carries  # scipy: for a changed codebook only

        carries = row_carries(job.inputs.codebooks, job.recipe.features)
    # What the parent was validated and served with is its average; so that is what goes on.
    keeps_average = job.recipe.ranking.trainer.ema_decay is not None
    average_of = None if keeps_average else saved_average
    try:
        report = load_into(job.inputs.parent_checkpoint, sharded, carries, average_of)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {_how(job.inputs.parent_checkpoint.parent)}") from error
    drawn = report.initialised
    own = {n: why for n, why in drawn.items() if not n.startswith(f"{BUFFERS}{AVERAGE}.")}
    if len(own) < len(drawn):  # the parent had no average, or that of another model
        model: RankingStep = sharded.model.module
        model.start_average()
        report = report.model_copy(update={"initialised": own})
    report = _forget_steps_of_parent(report, sharded)
    if dist.get_rank() == 0:
        write_durably(record, report.model_dump_json(indent=2))
    return Progress(), report


def _how(train: Path) -> str:
    again = run_command(train.parent.parent, train.parent.name)
    return (
        f"once {train} is deleted, {again} makes it again, and until then later days start from "
        "the model before it"
    )


def _forget_steps_of_parent(report: WarmStartReport, sharded: Sharded) -> WarmStartReport:
    """What the content loss holds of them names items by the rows that they had there."""
    held = [name for name in report.carried if name.startswith(f"{BUFFERS}{PENALTY}.")]
    if not held:
        return report
    model: RankingStep = sharded.model.module
    assert model.content_penalty is not None
    model.content_penalty.loss.forget()
    initialised = report.initialised | dict.fromkeys(held, "of the earlier run's steps")
    carried = tuple(name for name in report.carried if name not in held)
    return report.model_copy(update={"carried": carried, "initialised": initialised})


@contextmanager
def _rank_content(
    recipe: Recipe, paths: ContentPaths | None, device: torch.device, *, predicts: bool = False
) -> "Iterator[RankContent | None]":
    """None if the recipe reads none."""
    if recipe.content is None:
        yield None
        return
    from pipeline.content.training import rank_content  # transformers: seconds, for content only

    content = rank_content(recipe, paths, device, predicts=predicts)
    assert content is not None
    try:
        yield content
    except BaseException:
        # A process that is kept for the next training would keep its actors, too.
        content.source.close(is_orderly=False)
        raise
    content.source.close()


def _prepare_process(recipe: Recipe, logs: Path) -> torch.device:
    """Memory, notices and threads of this worker; its device."""
    keep_freed_memory()
    divert_library_notices(logs / f"notices-rank-{dist.get_rank():05d}.log")
    if recipe.cluster.use_gpu:
        device = own_device()
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)  # of trainings before, in a process that is kept
        return device
    torch.set_num_threads(max(int(recipe.cluster.cpus_per_worker), 1))
    return torch.device("cpu")


def _loader(recipe: Recipe, paths: list[Path], content: "RankContent | None") -> SampleLoader:
    trainer = recipe.ranking.trainer
    return SampleLoader(
        SampleFiles(
            paths,
            recipe.features,
            [task.name for task in recipe.ranking.tasks],
            items=None if content is None else content.items,
        ),
        batch_size_per_rank=trainer.batch_size_per_rank,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=trainer.seed,
        pin_memory=recipe.cluster.use_gpu,
    )


def _ignore(*_: object) -> None:
    """Only rank 0 records metrics."""


def prediction_schema(tasks: list[str]) -> pa.Schema:
    """Columns of a predictions file."""
    return pa.schema(
        [pa.field(columns.key_column(key), pa.int64()) for key in columns.KEYS]
        + [pa.field(columns.label_column(task), pa.float32()) for task in tasks]
        + [pa.field(columns.weight_column(task), pa.float32()) for task in tasks]
        + [pa.field(columns.probability_column(task), pa.float64()) for task in tasks]
    )


def prediction_batch(predictions: Predictions, tasks: list[str]) -> pa.RecordBatch:
    """Keys, labels (null where missing), weights and probabilities of one batch."""
    keys = [column.numpy() for column in predictions.keys_RK.unbind(1)]
    labels = [
        pa.array(labels_R.numpy(), mask=(weights_R == 0).numpy())
        for labels_R, weights_R in zip(
            predictions.labels_RT.unbind(1), predictions.weights_RT.unbind(1), strict=True
        )
    ]
    weights = [weights_R.contiguous().numpy() for weights_R in predictions.weights_RT.unbind(1)]
    probs = [probs_R.contiguous().numpy() for probs_R in predictions.probs_RT.unbind(1)]
    return pa.record_batch([*keys, *labels, *weights, *probs], schema=prediction_schema(tasks))


class MetricsFile:
    """`metrics.jsonl` and TensorBoard, written by rank 0; a restart cuts them back to its step.

    A line of the file is one JSON object: `step`; `rows` and `total_rows`, trained so far and in
    all; `line`, for people; and, by name (`train/ne`, `time/data_s`, ...), the numbers of a window
    of steps or of a validation.
    """

    def __init__(self, job: TrainJob, first: int) -> None:
        self.tasks = job.recipe.ranking.tasks
        path = job.resume / METRICS
        kept = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= first]
        # A new file under the old name: who follows it sees that the ranks started again.
        started = path.with_suffix(".started")
        started.write_text("".join(kept))
        self.file = started.replace(path).open("a")
        self.content: dict[str, float] | None = None
        """Figures of the last window, where the model reads content."""
        self.board = SummaryWriter(str(job.resume / TENSORBOARD), purge_step=first + 1)

    def add(self, reached: Reached, metrics: dict[str, float]) -> None:
        """Append the metrics of a window of steps, with the line a person reads."""
        found = {name: value for name, value in metrics.items() if name.startswith("content/")}
        self.content = found or None
        line = step_line(reached.step, reached.num_steps, self.tasks, metrics)
        self._append(reached, metrics, line)

    def add_validation(self, reached: Reached, metrics: dict[str, float]) -> None:
        """Append the metrics of the held-out rows."""
        self._append(reached, metrics, validation_line(reached.step, self.tasks, metrics))

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        self.board.close()

    def _append(self, reached: Reached, metrics: dict[str, float], line: str) -> None:
        record = {
            "step": reached.step,
            "rows": reached.rows,
            "total_rows": reached.num_rows,
            "line": line,
            **metrics,
        }
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, reached.step)

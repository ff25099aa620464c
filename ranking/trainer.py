"""The training loop of one rank. Knows nothing of Ray, files or process-group set-up."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embedding.batch import RankingBatch
from embedding.epochs import Leg, Position
from embedding.errors import UserError
from embedding.loader import BatchStream
from embedding.tables import in_tables
from ranking.clock import Clock
from ranking.config import TaskConfig, TrainerConfig
from ranking.metrics import MetricSums
from ranking.progress import Progress, Window
from ranking.step_line import memory_metrics, step_line, step_metrics

# Shapes: B samples, T tasks.

logger = logging.getLogger(__name__)

Outputs = tuple[Tensor, Tensor, Tensor]
"""(logits_BT, labels_BT, weights_BT) of a step."""


class BatchSource(Protocol):
    """Where batches come from; `embedding.loader.SampleLoader` is one."""

    batch_size_per_rank: int
    rank: int
    world_size: int

    def num_steps(self, position: Position) -> int:
        """Steps from `position` to the end of its epoch."""

    def shuffled(self, position: Position) -> BatchStream:
        """The batches from `position` to the end of its epoch."""


class StepOptimizer(Protocol):
    """What the loop needs of an optimizer: torch's and TorchRec's keyed ones have it."""

    def zero_grad(self, set_to_none: bool = ...) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Update the parameters."""


@dataclass(frozen=True)
class TrainingHooks:
    """What the loop tells its owner. Called on every rank, at the same steps."""

    report: Callable[[int, int, dict[str, float]], None]
    """Step, steps in all and global metrics, every `log_every_steps`."""
    save: Callable[[Progress], None]
    """Write a checkpoint of model, optimizer and this progress."""


@dataclass(frozen=True)
class TrainingSummary:
    """Figures of a finished `fit`, over all ranks."""

    steps: int
    """Steps of the whole run, those before a resume included."""
    rows: int
    """Real rows trained by this call."""
    seconds: float
    """Training time of this call without checkpoints."""
    data_wait_share: float
    world_size: int

    @property
    def rows_per_s(self) -> float:
        """Global throughput."""
        return self.rows / self.seconds if self.seconds else 0.0


class Trainer:
    """Runs training steps on one rank.

    Step s of rank r seeds torch's generators by (seed, s, r), so that dropout is the same after a
    resume and no random state has to be saved.
    """

    def __init__(
        self,
        config: TrainerConfig,
        tasks: Sequence[TaskConfig],
        *,
        model: nn.Module,
        optimizer: StepOptimizer,
        device: torch.device,
        hooks: TrainingHooks,
    ) -> None:
        """`model` maps a batch to (loss, outputs): a `RankingStep`, sharded or not.

        Raises:
            UserError: the device cannot compute in the configured precision.
        """
        check_precision(config.precision, device)
        self.config = config
        self.tasks = tasks
        self.model = model
        self.device = device
        self.hooks = hooks
        self._run_step = _step_function(model, optimizer, device, config.max_grad_norm)

    def fit(self, source: BatchSource, progress: Progress | None = None) -> TrainingSummary:
        """Train from `progress` to the end of the last epoch.

        Raises:
            UserError: the loss is no longer a finite number.
        """
        progress = progress or Progress()
        self.model.train()
        run = _Run(self, source, progress)
        for epoch in range(progress.position.epoch, self.config.epochs):
            position = progress.position if epoch == progress.position.epoch else None
            self._epoch(source, position or Position(epoch=epoch), run)
        run.finish()
        return run.summary()

    def _epoch(self, source: BatchSource, start: Position, run: "_Run") -> None:
        with source.shuffled(start) as stream:
            batches = iter(stream)
            for done in range(1, stream.num_steps + 1):
                self._seed(run.step, source.rank)
                outputs = self._run_step(batches)
                run.after_step(outputs, stream)
                leg = Leg(
                    world_size=source.world_size,
                    batch_size_per_rank=source.batch_size_per_rank,
                    steps=done,
                )
                run.position = start.after(leg)
                run.sync_if_due()
        run.position = Position(epoch=start.epoch + 1)

    def _seed(self, step: int, rank: int) -> None:
        mixed = np.random.SeedSequence([self.config.seed, step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)


class _Run:
    """Counters, metrics and clocks of one `fit`."""

    def __init__(self, trainer: Trainer, source: BatchSource, progress: Progress) -> None:
        self.trainer = trainer
        self.world_size = source.world_size
        self.is_logging_rank = source.rank == 0
        self.step = progress.step
        self.position = progress.position
        self.num_steps = progress.step + _steps_left(source, progress.position, trainer.config)
        self.window = Window(progress, len(trainer.tasks), trainer.device)
        self.saved_step: int | None = None
        self.reported_step = progress.step
        self.clock = Clock(progress.step)

    def after_step(self, outputs: Outputs, stream: BatchStream) -> None:
        """Count a step; nothing here waits for the device."""
        self.step += 1
        self.window.update(*outputs)
        self.clock.see(stream)

    def sync_if_due(self) -> None:
        """Report and save at their intervals; ranks meet here."""
        config = self.trainer.config
        if self.step % config.log_every_steps == 0:
            self._report()
        every = config.checkpoint_every_steps
        if every is not None and self.step % every == 0:
            self._save()

    def finish(self) -> None:
        """The last report and the last checkpoint."""
        if self.step > self.reported_step:
            self._report()
        if self.saved_step != self.step:
            self._save()

    def summary(self) -> TrainingSummary:
        """Figures of all windows."""
        clock = self.clock
        return TrainingSummary(
            steps=self.step,
            rows=clock.total_rows,
            seconds=clock.total_s,
            data_wait_share=clock.total_data_s / clock.total_s if clock.total_s else 0.0,
            world_size=self.world_size,
        )

    def _fold(self) -> tuple[MetricSums, int]:
        """Ranks add their sums up, and agree on whether training is still sound."""
        sums, num_slots, rows_waited = self.window.fold(self.clock.take_rank_values())
        self.clock.add_global(rows_waited.tolist(), self.world_size)
        self._refuse_divergence(sums)
        return sums, num_slots

    def _report(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        sums, num_slots = self._fold()
        timing = self.clock.lap(self.step)
        metrics = step_metrics(self.trainer.tasks, sums, num_slots, timing)
        metrics |= memory_metrics(self.trainer.device)
        self.window.clear()
        self.reported_step = self.step
        if self.is_logging_rank:
            logger.info(step_line(self.step, self.num_steps, self.trainer.tasks, metrics))
        self.trainer.hooks.report(self.step, self.num_steps, metrics)

    def _save(self) -> None:
        sums, num_slots = self._fold()
        with self.clock.paused():
            self.trainer.hooks.save(Progress(self.step, self.position, sums.sums_TX, num_slots))
        self.saved_step = self.step

    def _refuse_divergence(self, sums: MetricSums) -> None:
        for task, values in zip(self.trainer.tasks, sums.values(), strict=True):
            if values.logloss is not None and not math.isfinite(values.logloss):
                raise UserError(
                    f"the loss of task {task.name!r} became {values.logloss} before step "
                    f"{self.step}: training has diverged; lower "
                    "ranking.trainer.dense_optimizer.learning_rate and "
                    "embedding.optimizer.learning_rate, or set ranking.trainer.max_grad_norm"
                )


class _Clipped:
    """Clips the dense gradients before every step of the wrapped optimizer.

    Table gradients never exist as tensors (their optimizer is fused into backward), so their norm
    is not part of it.
    """

    def __init__(self, optimizer: StepOptimizer, model: nn.Module, max_norm: float) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.parameters = dense_parameters(model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Clip, then update."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside the embedding tables."""
    return [p for name, p in model.named_parameters() if not in_tables(name)]


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse bf16 where it would be emulated.

    Raises:
        UserError: the CPU has no bf16 matrix instructions.
    """
    if precision != "bf16" or device.type != "cpu" or cpu_has_bf16():
        return
    raise UserError(
        "ranking.trainer.precision=bf16: this CPU has neither avx512_bf16 nor amx instructions, "
        "and emulated bf16 products are hundreds of times slower; set ranking.trainer.precision "
        "to fp32"
    )


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _steps_left(source: BatchSource, start: Position, config: TrainerConfig) -> int:
    if start.epoch >= config.epochs:
        return 0
    later = [Position(epoch=epoch) for epoch in range(start.epoch + 1, config.epochs)]
    return sum(source.num_steps(position) for position in (start, *later))


def _step_function(
    model: nn.Module, optimizer: StepOptimizer, device: torch.device, max_grad_norm: float | None
) -> Callable[[Iterator[RankingBatch]], Outputs]:
    """One training step on the next batch; on CUDA overlapped with copies and input dist."""
    if max_grad_norm is not None:
        optimizer = _Clipped(optimizer, model, max_grad_norm)
    if device.type == "cuda":
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
        return pipeline.progress

    def step(batches: Iterator[RankingBatch]) -> Outputs:
        optimizer.zero_grad(set_to_none=True)
        loss, outputs = model(next(batches))
        loss.backward()
        optimizer.step()
        return outputs

    return step

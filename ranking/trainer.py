"""The training loop of one rank. Knows nothing of Ray, files or process-group set-up."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from embedding.batch import RankingBatch
from embedding.epochs import Leg, Position
from embedding.errors import UserError
from embedding.loader import BatchStream
from embedding.precision import check_precision
from ranking.clock import Clock, Totals
from ranking.config import TaskConfig
from ranking.model import RankingStep
from ranking.moments import agree_on_moments
from ranking.progress import Progress, Window, WindowSums
from ranking.schedule import LearningRates, rate_factor
from ranking.step_line import memory_metrics, step_line, step_metrics
from ranking.steps import Outputs, StepOptimizer, make_steps
from ranking.trainer_config import TrainerConfig
from ranking.validation import (
    DIVERGED,
    ValidationSource,
    ValidationState,
    deciding_value,
    validate,
    validation_line,
    validation_metrics,
)

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """Where batches come from; `embedding.loader.SampleLoader` is one."""

    batch_size_per_rank: int
    rank: int
    world_size: int

    def num_steps(self, position: Position) -> int:
        """Steps from `position` to the end of its epoch."""

    def rows_before(self, position: Position) -> int:
        """Rows from the start of the run to `position`, over all ranks."""

    def shuffled(self, position: Position) -> BatchStream:
        """The batches from `position` to the end of its epoch."""


@dataclass(frozen=True)
class Reached:
    """How far a run is, and how far it goes to the end of its last epoch; over all ranks."""

    step: int
    num_steps: int
    rows: int
    """Rows trained, whatever the numbers of ranks it ran on; none that only filled up a batch."""
    num_rows: int


@dataclass(frozen=True)
class TrainingHooks:
    """What the loop tells its owner. Called on every rank, at the same steps."""

    report: Callable[[Reached, dict[str, float]], None]
    """Global metrics of a window of steps, every `log_every_steps`."""
    save: Callable[[Progress], None]
    """Write a checkpoint of model, optimizer and this progress, and keep the one of
    `progress.validation.best_step`, which may be this one."""
    validated: Callable[[Reached, dict[str, float]], None]
    """Metrics of the held-out rows."""


@dataclass(frozen=True)
class TrainingSummary:
    """Figures of a finished `fit`, over all ranks."""

    steps: int
    """Steps of the whole run, those before a resume included."""
    totals: Totals
    """Rows and time of these steps. What came after the checkpoint of a resume and was lost with
    the processes that made it is not in them."""
    world_size: int
    position: Position
    """How far in the data the run got."""
    validation: ValidationState
    stopped_early: bool


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
        """`model` is a `RankingStep`, sharded or not.

        Raises:
            UserError: the device cannot compute in the configured precision.
        """
        check_precision(config.precision, device, "ranking.trainer.precision")
        self.config = config
        self.tasks = tasks
        self.model = model
        self.device = device
        self.hooks = hooks
        self.ranking = next(m for m in model.modules() if isinstance(m, RankingStep))
        self.content = self.ranking.content_source
        self.steps = make_steps(model, optimizer, device, config.max_grad_norm)
        self._rates = LearningRates(optimizer)

    def fit(
        self,
        source: BatchSource,
        progress: Progress | None = None,
        *,
        validation: ValidationSource | None = None,
        is_warm_start: bool = False,
    ) -> TrainingSummary:
        """Train from `progress` to the end of the last epoch, or until validation stops it.

        Args:
            source: of the batches.
            progress: of a run that goes on.
            validation: the held-out rows.
            is_warm_start: the weights are those of another run: they are validated before the first
                step, and are the result if no step makes them better.

        Raises:
            UserError: the loss is no longer a finite number, or the held-out rows decide nothing.
        """
        progress = progress or Progress()
        self.model.train()
        run = _Run(self, source, progress, validation)
        if is_warm_start and progress.step == 0:
            run.validate()
        for epoch in range(progress.position.epoch, self.config.epochs):
            position = progress.position if epoch == progress.position.epoch else None
            self._epoch(source, position or Position(epoch=epoch), run)
        run.finish()
        return run.summary()

    @property
    def rate_factor(self) -> float:
        """Factor on all learning rates in the last step."""
        return 1.0 if self._rates.factor is None else self._rates.factor

    def _epoch(self, source: BatchSource, start: Position, run: "_Run") -> None:
        if run.should_stop:
            return
        with source.shuffled(start) as stream:
            batches: Iterator[RankingBatch] = iter(stream)
            if self.content is not None:
                batches = self.content.ahead(batches)
            for done in range(1, stream.num_steps + 1):
                self._seed(run.step, source.rank)
                self._rates.set(run.rate_factor())
                outputs = self.steps.run(batches)
                if self.content is not None:
                    self.content.learn(self.rate_factor)
                self.ranking.update_average(run.step)
                run.after_step(outputs, stream)
                leg = Leg(
                    world_size=source.world_size,
                    batch_size_per_rank=source.batch_size_per_rank,
                    steps=done,
                )
                run.position = start.after(leg)
                run.sync_if_due(is_epoch_end=done == stream.num_steps)
                if run.should_stop:
                    return
        run.position = Position(epoch=start.epoch + 1)

    def _seed(self, step: int, rank: int) -> None:
        mixed = np.random.SeedSequence([self.config.seed, step, rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)


class _Run:
    """Counters, metrics and clocks of one `fit`."""

    def __init__(
        self,
        trainer: Trainer,
        source: BatchSource,
        progress: Progress,
        validation_source: ValidationSource | None,
    ) -> None:
        self.trainer = trainer
        self.source = source
        self.validation_source = validation_source
        self.validation = progress.validation
        self.world_size = source.world_size
        self.is_logging_rank = source.rank == 0
        self.step = progress.step
        self.position = progress.position
        self.num_steps = progress.step + _steps_left(source, progress.position, trainer.config)
        self.window = Window(progress, len(trainer.tasks), trainer.device)
        self.saved_step: int | None = None
        self.reported_step = progress.step
        self.clock = Clock(progress.step, progress.totals)
        self.totals = progress.totals

    def after_step(self, outputs: Outputs, stream: BatchStream) -> None:
        """Count a step; nothing here waits for the device."""
        self.step += 1
        self.window.update(*outputs)
        self.clock.see(stream)

    def rate_factor(self) -> float:
        """Of the next step."""
        schedule = self.trainer.config.schedule
        return rate_factor(schedule, self.step, self.num_steps) * self.validation.rate_factor

    @property
    def reached(self) -> Reached:
        """How far this run is."""
        end = Position(epoch=self.trainer.config.epochs)
        rows, num_rows = (self.source.rows_before(place) for place in (self.position, end))
        return Reached(self.step, self.num_steps, rows, num_rows)

    @property
    def should_stop(self) -> bool:
        """Whether validation has seen enough."""
        return self.validation.should_stop(self.trainer.config.validation)

    def sync_if_due(self, *, is_epoch_end: bool) -> None:
        """Report, validate and save at their intervals; ranks meet here.

        The checkpoint comes last: what was written for its step before is not written again.
        """
        config = self.trainer.config
        if self.step % config.log_every_steps == 0:
            self._report()
        every = config.validation.every_steps
        if is_epoch_end if every is None else self.step % every == 0:
            self.validate()
        every = config.checkpoint_every_steps
        if every is not None and self.step % every == 0:
            self._save()

    def finish(self) -> None:
        """The last report, validation and checkpoint."""
        if self.step > self.reported_step:
            self._report()
        self.validate()
        self._save()

    def summary(self) -> TrainingSummary:
        """Figures of all windows."""
        return TrainingSummary(
            steps=self.step,
            totals=self.totals,
            world_size=self.world_size,
            position=self.position,
            validation=self.validation,
            stopped_early=self.should_stop and self.step < self.num_steps,
        )

    def _fold(self) -> WindowSums:
        """Ranks add their sums up, and agree on whether training is still sound."""
        sums, rows_waited = self.window.fold(self.clock.take_rank_values())
        self.clock.add_global(rows_waited.tolist(), self.world_size)
        self._refuse_divergence(sums)
        return sums

    def _report(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        sums = self._fold()
        timing = self.clock.lap(self.step)
        metrics = step_metrics(self.trainer.tasks, sums, timing)
        metrics["train/rate_factor"] = self.trainer.rate_factor
        metrics |= memory_metrics(self.trainer.device)
        if self.trainer.content is not None:
            metrics |= self.trainer.content.metrics()
        self.window.clear()
        self.reported_step = self.step
        if self.is_logging_rank:
            logger.info(step_line(self.step, self.num_steps, self.trainer.tasks, metrics))
        self.trainer.hooks.report(self.reached, metrics)

    def validate(self) -> None:
        """Validate, and save what is the best so far: its checkpoint will be the result."""
        if self.validation_source is None or self.validation.last_step == self.step:
            return
        trainer, config = self.trainer, self.trainer.config
        with self.clock.paused("validation"):
            trainer.steps.pause()
            agree_on_moments(trainer.model)
            if trainer.content is not None:
                trainer.content.refresh()
            source, device = self.validation_source, trainer.device
            with trainer.ranking.averaged():
                values = validate(trainer.model, source, device, len(trainer.tasks))
        value = deciding_value(config.validation, trainer.tasks, values)
        self.validation = self.validation.after(self.step, value, config)
        metrics = validation_metrics(trainer.tasks, values, self.validation)
        if self.is_logging_rank:
            logger.info(validation_line(self.step, trainer.tasks, metrics))
        trainer.hooks.validated(self.reached, metrics)
        if self.validation.best_step == self.step:
            self._save()

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        sums = self._fold()
        self.totals = self.clock.totals
        content = self.trainer.content
        with self.clock.paused("checkpoint"):
            agree_on_moments(self.trainer.model)
            if content is not None and self.step == self.num_steps:
                content.refresh()  # a result holds vectors of all items, as its weights make them
            self.trainer.hooks.save(
                Progress(
                    self.step,
                    self.position,
                    sums.metrics.sums_TX,
                    sums.num_slots,
                    sums.penalty,
                    self.validation,
                    self.totals,
                )
            )
        self.saved_step = self.step

    def _refuse_divergence(self, sums: WindowSums) -> None:
        losses = {
            f"loss of task {task.name!r}": values.logloss
            for task, values in zip(self.trainer.tasks, sums.metrics.values(), strict=True)
        }
        losses["penalty (content.cic, embedding.l2)"] = sums.mean_penalty
        for name, value in losses.items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"the {name} became {value} before step {self.step}: {DIVERGED}")


def _steps_left(source: BatchSource, start: Position, config: TrainerConfig) -> int:
    if start.epoch >= config.epochs:
        return 0
    later = [Position(epoch=epoch) for epoch in range(start.epoch + 1, config.epochs)]
    return sum(source.num_steps(position) for position in (start, *later))

"""Where the time of a training run goes, measured between synchronised points."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embedding.loader import BatchStream, LoaderStats

Pause = Literal["checkpoint", "validation"]
_PAUSES: tuple[Pause, ...] = ("checkpoint", "validation")


@dataclass(frozen=True)
class WindowTiming:
    """Time of the steps between two synchronised points."""

    steps: int
    elapsed_s: float
    """Without checkpoints and validations."""
    data_s: float
    """Seconds the average rank waited for data."""
    checkpoint_s: float
    validation_s: float
    num_rows: int
    """Real rows over all ranks."""


@dataclass(frozen=True)
class Totals:
    """Cost of all steps that a run is made of, whichever processes made them."""

    rows: int = 0
    """Real rows over all ranks."""
    seconds: float = 0.0
    """Without checkpoints and validations."""
    data_s: float = 0.0
    """Seconds the average rank waited for data."""

    @property
    def rows_per_s(self) -> float:
        """Global throughput."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        """Of the training time."""
        return self.data_s / self.seconds if self.seconds else 0.0


class Clock:
    """Counts rows, waiting and elapsed time of one rank; windows end where ranks meet."""

    def __init__(self, step: int, before: Totals) -> None:
        """Start at `step`, with the totals `before` it."""
        self._before = before
        self._step = step
        self._started = time.perf_counter()
        self._stream: BatchStream | None = None
        self._seen = LoaderStats()
        self._rank_rows = 0
        self._rank_wait_s = 0.0
        self._rows = 0
        self._data_s = 0.0
        self._paused_s = dict.fromkeys(_PAUSES, 0.0)

    def see(self, stream: BatchStream) -> None:
        """Take over what the stream has handed out and how long it was waited for."""
        if stream is not self._stream:
            self._stream, self._seen = stream, LoaderStats()
        stats = stream.stats
        self._rank_rows += stats.rows - self._seen.rows
        self._rank_wait_s += stats.wait_s - self._seen.wait_s
        self._seen = stats

    def take_rank_values(self) -> Tensor:
        """[rows, seconds waited] of this rank since the last call, to be summed over ranks."""
        values = torch.tensor([float(self._rank_rows), self._rank_wait_s], dtype=torch.float64)
        self._rank_rows, self._rank_wait_s = 0, 0.0
        return values

    def add_global(self, rank_values: Sequence[float], world_size: int) -> None:
        """Add what `take_rank_values` gave, summed over ranks."""
        rows, wait_s = rank_values
        self._rows += round(rows)
        self._data_s += wait_s / world_size

    @contextmanager
    def paused(self, reason: Pause) -> Iterator[None]:
        """Time in the block is not training."""
        started = time.perf_counter()
        yield
        self._paused_s[reason] += time.perf_counter() - started

    @property
    def totals(self) -> Totals:
        """So far, the window that is not over yet included; rows as of the last `add_global`."""
        return Totals(
            rows=self._before.rows + self._rows,
            seconds=self._before.seconds + self._elapsed_s(time.perf_counter()),
            data_s=self._before.data_s + self._data_s,
        )

    def lap(self, step: int) -> WindowTiming:
        """End the window at `step`."""
        now = time.perf_counter()
        timing = WindowTiming(
            steps=step - self._step,
            elapsed_s=self._elapsed_s(now),
            data_s=self._data_s,
            checkpoint_s=self._paused_s["checkpoint"],
            validation_s=self._paused_s["validation"],
            num_rows=self._rows,
        )
        self._before = Totals(
            rows=self._before.rows + timing.num_rows,
            seconds=self._before.seconds + timing.elapsed_s,
            data_s=self._before.data_s + timing.data_s,
        )
        self._step, self._started = step, now
        self._rows, self._data_s = 0, 0.0
        self._paused_s = dict.fromkeys(_PAUSES, 0.0)
        return timing

    def _elapsed_s(self, now: float) -> float:
        return now - self._started - sum(self._paused_s.values())

"""Time that parts of training steps take, without making a step wait for its device."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of marked blocks.

    On a GPU it is the time of the device's work: what a block starts runs on after it ends, and the
    clock of the host would count the starting alone. Blocks run in one stream, one after another.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Start and end of blocks that the device may not have done yet."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        if not self._is_cuda:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._running.append((start, end))
        while self._running and self._running[0][1].query():
            self._add_first()

    def take(self) -> float:
        """Seconds since the last call; waits until the device has done what was started."""
        while self._running:
            self._running[0][1].synchronize()
            self._add_first()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_first(self) -> None:
        start, end = self._running.popleft()
        self._seconds += start.elapsed_time(end) / 1000

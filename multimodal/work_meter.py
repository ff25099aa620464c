"""What a piece of PyTorch work takes: operations, bytes alive at once, seconds on one core."""

import time
import weakref
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REPEATS = 3


class WorkMeter(TorchDispatchMode):
    """Counts what runs inside the block, backward too.

    Views are no operations. Memory that was there before does not count, and what kernels use
    within themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        """The most that was alive at once."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)
        result = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        # A storage's Python object lives as long as its memory.
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()


def seconds_on_one_core(*parts: Callable[[], object]) -> tuple[float, ...]:
    """Median seconds of each part; the parts run one after the other, several times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[_timed(part) for part in parts] for _ in range(_REPEATS + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    return tuple(median(of_part) for of_part in zip(*rounds, strict=True))


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started

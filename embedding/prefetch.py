"""An iterator run ahead in a thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_POLL_S = 0.1  # how often a blocked thread looks whether it should stop


class Prefetched(Generic[T]):
    """An iterator that is run ahead in a thread, at most `depth` items.

    An exception of the source is raised by the consumer's `next`. Close it, or use it in a `with`
    block: the thread ends within a fraction of a second.
    """

    def __init__(self, source: Callable[[], Iterator[T]], depth: int) -> None:
        self.wait_s = 0.0
        self._queue: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        started = time.perf_counter()
        item = self._get()
        self.wait_s += time.perf_counter() - started
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def stop(self) -> None:
        """Ask the thread to end."""
        self._ended = True
        self._stop.set()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self.stop()
        self._thread.join()

    def _run(self, source: Callable[[], Iterator[T]]) -> None:
        error: BaseException | None = None
        try:
            for item in source():
                if not self._put(item):
                    break
        except BaseException as caught:  # noqa: BLE001 - handed to the consumer, who raises it
            error = caught
        self._put(_End(error))

    def _get(self) -> "T | _End":
        while True:
            try:
                return self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if self._stop.is_set():  # closed by another thread: nothing more will come
                    return _End(None)

    def _put(self, item: "T | _End") -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False


@dataclass(frozen=True)
class _End:
    error: BaseException | None

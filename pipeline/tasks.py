"""Tasks that read and write files by themselves, as Ray tasks over the cluster.

A task returns a few figures, so nothing large passes through the object store, and what is written
does not depend on how many tasks run at once. No Ray Data: its executor waits for CPUs in silence,
starts crashed tasks again without end, and gives up on a task that is silent for half an hour.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import ray

from embedding.errors import UserError

Task = TypeVar("Task")
Shared = TypeVar("Shared")
Result = TypeVar("Result")

ROWS_PER_BUNDLE = 1 << 17
_RETRIES = 2
"""Of a task whose process or node died."""
_SILENT_S = 60.0
"""Without a result for so long, a line says so."""

logger = logging.getLogger(__name__)


def bundles(rows: Sequence[int]) -> list[range]:
    """Consecutive tasks that are sent together: small ones share what it costs to send one.

    Args:
        rows: rows of every task; a bundle ends once it has `ROWS_PER_BUNDLE` of them.
    """
    found, start, total = [], 0, 0
    for i, count in enumerate(rows):
        total += count
        if total >= ROWS_PER_BUNDLE or i == len(rows) - 1:
            found.append(range(start, i + 1))
            start, total = i + 1, 0
    return found


def stream_tasks(
    run: Callable[[Task, Shared], Result],
    tasks: Sequence[Task],
    shared: Shared,
    rows: Sequence[int],
) -> Iterator[Result]:
    """Run `run(task, shared)` for every task on the cluster; one CPU each bundle of tasks.

    Args:
        run: an importable function.
        tasks: its first argument, one after the other.
        shared: its second argument, always the same.
        rows: rows of every task.

    Yields:
        The results, in the order in which tasks finish.

    Raises:
        UserError: a task raised it.
    """
    pieces = [[tasks[i] for i in bundle] for bundle in bundles(rows)]
    yield from stream_results(partial(_each, run), pieces, shared)


def stream_results(
    run: Callable[[Task, Shared], Iterable[Result]],
    tasks: Sequence[Task],
    shared: Shared,
) -> Iterator[Result]:
    """What `run(task, shared)` yields, for every task on the cluster, as it comes; one CPU each.

    `shared` is put into the object store once; its arrays are read there without a copy. A task
    whose process dies is run again, and what it had yielded is not yielded twice. As many run at
    once as the cluster has CPUs, and never more: tasks that wait would have an autoscaler add
    nodes, of whatever kind.

    Args:
        run: an importable function.
        tasks: its first argument.
        shared: its second argument, always the same.

    Raises:
        UserError: a task raised it.
        ray.exceptions.RayError: a task raised something else, or its process died every time.
    """
    if not tasks:
        return
    remote = ray.remote(_results).options(
        num_returns="streaming",
        num_cpus=1,
        max_retries=_RETRIES,
        scheduling_strategy="SPREAD",
    )
    reference = ray.put(shared)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1.0)))
    todo, running = iter(tasks), list[Any]()
    said = time.monotonic()
    try:
        while True:
            for task in islice(todo, at_once - len(running)):
                running.append(remote.remote(run, task, reference))
            if not running:
                return
            ready, _ = ray.wait(running, num_returns=1, timeout=_SILENT_S)
            if not ready:
                free = ray.available_resources().get("CPU", 0.0)
                silent_s = time.monotonic() - said
                logger.warning(
                    "%d tasks at work or waiting for a CPU (%g free): no result for %.0f s",
                    len(running),
                    free,
                    silent_s,
                )
                continue
            said = time.monotonic()
            (stream,) = ready
            try:
                result = ray.get(next(stream))
            except StopIteration:
                running.remove(stream)
                continue
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        for stream in running:
            ray.cancel(stream)


def _each(
    run: Callable[[Task, Shared], Result], tasks: list[Task], shared: Shared
) -> Iterator[Result]:
    for task in tasks:
        yield run(task, shared)


def _results(
    run: Callable[[Task, Shared], Iterable[Result]], task: Task, shared: Shared
) -> Iterator[Result | UserError]:
    try:
        yield from run(task, shared)
    except UserError as error:
        # As data: Ray would wrap the exception into its own and bury the sentence.
        yield error

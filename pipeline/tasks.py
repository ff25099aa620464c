"""Ray Data as the executor of file-sized tasks.

A task reads and writes files by itself and returns a few figures, so nothing large passes through
the object store, and what is written does not depend on how many tasks run at once.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.data import DataContext

from embedding.errors import UserError

Task = TypeVar("Task")
Shared = TypeVar("Shared")
Result = TypeVar("Result")


ROWS_PER_BUNDLE = 1 << 17


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

    `shared` is put into the object store once; its arrays are read there without a copy.

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
    if not tasks:
        return
    reference = ray.put(shared)

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            own = ray.get(reference)
            return {"result": pickle.dumps([run(task, own) for task in pickle.loads(row["tasks"])])}
        except UserError as error:
            # As data: Ray Data would wrap the exception into its own and bury the sentence.
            return {"result": pickle.dumps(error)}

    # The driver shows its own progress.
    DataContext.get_current().enable_progress_bars = False
    items = [{"tasks": pickle.dumps([tasks[i] for i in bundle])} for bundle in bundles(rows)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(call)
    for row in dataset.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError):
            raise result
        yield from result

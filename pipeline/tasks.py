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


def stream_tasks(
    run: Callable[[Task, Shared], Result], tasks: Sequence[Task], shared: Shared
) -> Iterator[Result]:
    """Run `run(task, shared)` for every task on the cluster; one CPU each.

    `shared` is put into the object store once; its arrays are read there without a copy.

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
            return {"result": pickle.dumps(run(pickle.loads(row["task"]), ray.get(reference)))}
        except UserError as error:
            # As data: Ray Data would wrap the exception into its own and bury the sentence.
            return {"result": pickle.dumps(error)}

    # The driver shows its own progress.
    DataContext.get_current().enable_progress_bars = False
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(call)
    for row in dataset.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError):
            raise result
        yield result

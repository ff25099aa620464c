"""Workers of Ray Data that encode new items for the content stage."""

import pickle
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import ray
from ray.data import DataContext, TaskPoolStrategy

from embedding.errors import UserError
from multimodal.content_config import TokenStage
from pipeline.content_tasks import EncodeItems, EncoderSettings, EncodeTask


@lru_cache(maxsize=1)
def _encoder(settings: bytes) -> EncodeItems:
    """Loaded once a worker process, which Ray uses for task after task."""
    return EncodeItems(pickle.loads(settings))


def encode_row(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sizes of the parts a task wrote; a fault of the user travels as data, and stays whole."""
    try:
        for count in _encoder(row["settings"])(pickle.loads(row["task"])):
            yield {"result": pickle.dumps(count)}
    except UserError as error:
        yield {"result": pickle.dumps(error)}


def encode_on_workers(
    tasks: list[EncodeTask], settings: EncoderSettings, stage: TokenStage
) -> Iterator[int]:
    """Run the tasks on the stage's workers.

    Yields:
        Numbers of encoded items, as parts are written.

    Raises:
        UserError: a task raised it.
    """
    if not tasks:
        return
    # The driver shows its own progress.
    DataContext.get_current().enable_progress_bars = False
    shared = pickle.dumps(settings)
    rows = [{"task": pickle.dumps(task), "settings": shared} for task in tasks]
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        encode_row,
        compute=TaskPoolStrategy(size=stage.num_workers),
        num_cpus=stage.cpus_per_worker,
        num_gpus=stage.gpus_per_worker,
    )
    for row in encoded.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError):
            raise result
        yield result

"""Workers that encode new items for the content stage."""

import pickle
from collections.abc import Iterator
from functools import lru_cache

from multimodal.content_config import TokenStage
from pipeline.cluster import Bundle
from pipeline.content.tasks import EncoderSettings, EncodeTask, TokenWriter
from pipeline.tasks import stream_results


@lru_cache(maxsize=1)
def _encoder(settings: bytes) -> TokenWriter:
    """Loaded once a worker process, which Ray uses for task after task."""
    return TokenWriter(pickle.loads(settings))


def encode_items(task: EncodeTask, settings: bytes) -> Iterator[int]:
    """Sizes of the parts a task writes."""
    yield from _encoder(settings)(task)


def encode_on_workers(
    tasks: list[EncodeTask], settings: EncoderSettings, stage: TokenStage
) -> Iterator[int]:
    """Run the tasks on the stage's workers.

    Yields:
        Numbers of encoded items, as parts are written.

    Raises:
        UserError: a task raised it.
    """
    yield from stream_results(
        encode_items,
        tasks,
        pickle.dumps(settings),
        asked=worker_of(stage),
        max_parallel=stage.num_workers,
    )


def worker_of(stage: TokenStage) -> Bundle:
    """What a worker asks for."""
    return {"CPU": stage.cpus_per_worker, "GPU": stage.gpus_per_worker}

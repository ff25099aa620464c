"""Workers that encode new items for the content stage."""

from collections.abc import Callable, Iterator
from functools import partial

from multimodal.content_config import TokenStage
from pipeline.cluster import Bundle, room_for
from pipeline.content.tasks import EncoderSettings, EncodeTask, TokenWriter
from pipeline.pieces import stream_pieces


def _encoder(settings: EncoderSettings) -> Callable[[EncodeTask], int]:
    """Runs on a worker; what it returns gives the number of items that it has stored."""
    writer = TokenWriter(settings)
    return lambda task: sum(writer(task))


def encode_on_workers(
    tasks: list[EncodeTask], settings: EncoderSettings, stage: TokenStage
) -> Iterator[int]:
    """Run the tasks on the stage's workers.

    Yields:
        Numbers of encoded items, as tasks are done.

    Raises:
        UserError: a task raised it.
    """
    if not tasks:
        return
    load, asked = partial(_encoder, settings), worker_of(stage)
    num_actors = min(len(tasks), stage.num_workers, max(1, room_for(asked)))
    for _, num_items in stream_pieces(load, tasks, asked=asked, num_actors=int(num_actors)):
        yield num_items


def worker_of(stage: TokenStage) -> Bundle:
    """What a worker asks for."""
    return {"CPU": stage.cpus_per_worker, "GPU": stage.gpus_per_worker}

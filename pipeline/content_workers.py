"""Actors of Ray Data that encode new items for the content stage."""

import pickle
from collections.abc import Iterator
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from embedding.errors import UserError
from multimodal.content_config import TokenStage
from pipeline.content_tasks import EncodeItems, EncoderSettings, EncodeTask


class EncodeRows:
    """`EncodeItems` for rows of a dataset: one row a task in, one row a stored part out."""

    def __init__(self, settings: EncoderSettings) -> None:
        self.encode = EncodeItems(settings)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Sizes of the parts written; a user's fault travels as data, so that Ray keeps it."""
        try:
            for count in self.encode(pickle.loads(row["task"])):
                yield {"result": pickle.dumps(count)}
        except UserError as error:
            yield {"result": pickle.dumps(error)}


def encode_on_actors(
    tasks: list[EncodeTask], settings: EncoderSettings, stage: TokenStage
) -> Iterator[int]:
    """Run the tasks on the stage's actors.

    Yields:
        Numbers of encoded items, as parts are written.

    Raises:
        UserError: a task raised it.
    """
    if not tasks:
        return
    # The driver shows its own progress.
    DataContext.get_current().enable_progress_bars = False
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        EncodeRows,
        fn_constructor_args=(settings,),
        compute=ActorPoolStrategy(size=min(stage.num_actors, len(tasks))),
        num_cpus=stage.cpus_per_actor,
        num_gpus=stage.gpus_per_actor,
    )
    for row in encoded.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserError):
            raise result
        yield result

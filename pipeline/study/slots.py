"""Where a trial of a study runs: room for its rank and its actors, which it gets whole or not."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from pipeline.cluster import Bundle, actors_of, worker_bundle
from pipeline.config import ClusterConfig, Recipe

_ROUNDING = 1e-9
"""Of thirds of a GPU, say."""


def actors_of_any(recipes: Sequence[Recipe]) -> list[Bundle]:
    """Room beside one rank for the actors of whichever of the recipes it trains."""
    return [
        {kind: max(actor[kind] for actor in actors) for kind in ("CPU", "GPU")}
        for actors in zip_longest(*map(actors_of, recipes), fillvalue={"CPU": 0.0, "GPU": 0.0})
    ]


def slot_bundles(
    cluster: ClusterConfig, *, trials_per_gpu: int, actors: Sequence[Bundle]
) -> list[Bundle]:
    """What one trial asks for: its rank first, then its actors.

    Args:
        cluster: of the rank.
        trials_per_gpu: ranks that share a GPU.
        actors: beside it; those that ask for nothing need no room.
    """
    gpus = {"GPU": 1 / trials_per_gpu} if cluster.use_gpu else {}
    asked = [{kind: each for kind, each in actor.items() if each} for actor in actors]
    return [worker_bundle(cluster) | gpus, *(actor for actor in asked if actor)]


def trial_slots(resources: Mapping[str, float], slot: Sequence[Bundle], num_trials: int) -> int:
    """Trials that an empty cluster runs side by side: so many processes are asked for."""
    room = num_trials
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0.0) for bundle in slot)
        if asked:
            room = min(room, math.floor(resources.get(kind, 0.0) / asked + _ROUNDING))
    return max(1, room)

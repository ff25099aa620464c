"""How many trials of a study run side by side: each has a rank, and actors of its own beside it."""

import math
from collections.abc import Mapping, Sequence

from pipeline.cluster import Bundle, actors_of
from pipeline.config import ClusterConfig, Recipe

_ROUNDING = 1e-9
"""Of thirds of a GPU, say."""


def actors_of_any(recipes: Sequence[Recipe]) -> list[Bundle]:
    """What the actors beside one trial ask for, whichever of the recipes it runs.

    In all as many CPUs as those of the recipe that needs most of them, and likewise GPUs.
    """
    groups = [actors_of(recipe) for recipe in recipes]
    largest = max(groups, key=lambda group: _total(group, "CPU"))
    gpus = max(_total(group, "GPU") for group in groups) - _total(largest, "GPU")
    return largest + [{"CPU": 0.0, "GPU": 1.0}] * math.ceil(gpus)


def trial_slots(
    resources: Mapping[str, float],
    cluster: ClusterConfig,
    num_trials: int,
    *,
    trials_per_gpu: int,
    actors: Sequence[Bundle],
) -> int:
    """Trials of one rank that run side by side, each with actors of its own beside it."""
    cpus = cluster.cpus_per_worker + _total(actors, "CPU")
    gpus = (1 / trials_per_gpu if cluster.use_gpu else 0.0) + _total(actors, "GPU")
    room = math.floor(resources.get("CPU", 1) / cpus + _ROUNDING)
    if gpus:
        room = min(room, math.floor(resources.get("GPU", 0) / gpus + _ROUNDING))
    return max(1, min(room, num_trials))


def _total(actors: Sequence[Bundle], kind: str) -> float:
    return sum(actor[kind] for actor in actors)

"""What is free on the cluster, in words."""

from collections.abc import Iterable

import ray


def free_now(kinds: Iterable[str]) -> str:
    """As `2 of 8 CPU and 0 of 1 GPU`; needs an initialised Ray."""
    free, there = ray.available_resources(), ray.cluster_resources()
    return " and ".join(f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}" for kind in kinds)

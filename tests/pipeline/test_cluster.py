"""A cluster that is too small, with and without an autoscaler; Ray and the clock are stand-ins."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.autoscaler import sdk

from embedding.errors import UserError
from pipeline import cluster as cluster_module
from pipeline.cluster import RaySession
from pipeline.config import ClusterConfig

GROUP = {"num_workers": 4, "cpus_per_worker": 2, "use_gpu": True}


class Cluster:
    """Grows a GPU worker of 8 CPUs and 2 GPUs at each of `arrivals_s`; the head has nothing."""

    def __init__(self, arrivals_s: list[float]) -> None:
        self.arrivals_s = arrivals_s
        self.now_s = 0.0
        self.requests: list[Any] = []
        self.lines: list[str] = []

    def resources(self) -> dict[str, float]:
        asked = any(self.requests)
        workers = sum(asked and at <= self.now_s for at in self.arrivals_s)
        return {"CPU": 8.0 * workers, "GPU": 2.0 * workers} if workers else {"memory": 1.0}

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """Starts a session in a cluster whose workers arrive at the given seconds."""
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")

    def run(arrivals_s: list[float], **config: Any) -> Cluster:
        cluster = Cluster(arrivals_s)
        monkeypatch.setattr(ray, "init", lambda **_: None)
        monkeypatch.setattr(ray, "cluster_resources", cluster.resources)
        monkeypatch.setattr(
            sdk, "request_resources", lambda bundles: cluster.requests.append(bundles)
        )
        monkeypatch.setattr(cluster_module.time, "monotonic", lambda: cluster.now_s)
        monkeypatch.setattr(cluster_module.time, "sleep", cluster.sleep)
        session = RaySession(ClusterConfig(**GROUP, **config), say=cluster.lines.append)
        try:
            session.start()
        except UserError as error:
            cluster.lines.append(f"error: {error}")
        return cluster

    return run


def test_nodes_are_asked_for_and_awaited(start: Callable[..., Cluster]) -> None:
    cluster = start([20.0, 50.0], autoscale_timeout_s=600)

    assert cluster.requests == [[{"CPU": 2.0, "GPU": 1}] * 4, []], (
        "and not kept when they are there"
    )
    assert cluster.now_s == 60, "four looks, 15 seconds apart"
    assert "needs 8 CPUs and the cluster has 0; waiting for nodes (0 of 600 s)" in cluster.lines[0]
    assert "as many GPUs and the cluster has 2; waiting for nodes (30" in cluster.lines[2]
    assert len(cluster.lines) == 4


def test_nodes_that_do_not_come_end_the_wait_with_a_sentence(start: Callable[..., Cluster]) -> None:
    cluster = start([20.0], autoscale_timeout_s=100)

    assert cluster.now_s == 100
    assert cluster.requests[-1] == []
    pattern = (
        r"error: .*has 2; no node came within cluster.autoscale_timeout_s=100: see `ray status`"
    )
    assert re.match(pattern, cluster.lines[-1])


def test_without_an_autoscaler_a_small_cluster_is_refused_at_once(
    start: Callable[..., Cluster],
) -> None:
    cluster = start([0.0])

    assert (cluster.now_s, cluster.requests) == (0, [])
    assert cluster.lines == [
        "error: cluster.num_workers=4 x cpus_per_worker=2 needs 8 CPUs and the cluster has 0; "
        "lower num_workers, or add nodes; where an autoscaler adds them, set "
        "cluster.autoscale_timeout_s"
    ]

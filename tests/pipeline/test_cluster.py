"""Waiting for a cluster that is too small or in use; Ray and the clock are stand-ins."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from embedding.errors import UserError
from pipeline import cluster as cluster_module
from pipeline.cluster import (
    Bundle,
    RaySession,
    fitting,
    lacking_resources,
    require_absolute,
    usable_cpus,
)
from pipeline.config import ClusterConfig
from tests.pipeline.cluster_tasks import Holder, times

GROUP = {"num_workers": 4, "cpus_per_worker": 2, "use_gpu": True}
NODE = {"CPU": 8.0, "GPU": 2.0}


class Cluster:
    """A node of 8 CPUs and 2 GPUs comes at each of `arrivals_s`, of use from `free_s` on."""

    def __init__(self, arrivals_s: list[float], free_s: float, monkeypatch: Any) -> None:
        self.arrivals_s = arrivals_s
        self.free_s = free_s
        self.now_s = 0.0
        self.groups: list[list[Bundle]] = []
        """Placement groups that are not removed."""
        self.asked: list[list[Bundle]] = []
        self.lines: list[str] = []
        monkeypatch.setattr(ray, "init", lambda **_: None)
        monkeypatch.setattr(ray, "nodes", self.nodes)
        monkeypatch.setattr(ray, "cluster_resources", self.total)
        monkeypatch.setattr(
            ray, "available_resources", lambda: self.total() if self.now_s >= self.free_s else {}
        )
        monkeypatch.setattr(ray.util, "placement_group", lambda bundles: Group(self, bundles))
        monkeypatch.setattr(
            ray.util, "remove_placement_group", lambda group: self.groups.remove(group.bundles)
        )
        monkeypatch.setattr(cluster_module.time, "monotonic", lambda: self.now_s)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": NODE} for at in self.arrivals_s if at <= self.now_s]

    def total(self) -> dict[str, float]:
        return {kind: each * len(self.nodes()) for kind, each in NODE.items()}

    def session(self, **config: Any) -> RaySession:
        return RaySession(ClusterConfig(**{**GROUP, **config}), say=self.lines.append)


class Group:
    def __init__(self, cluster: Cluster, bundles: list[Bundle]) -> None:
        self.cluster, self.bundles = cluster, bundles
        cluster.groups.append(bundles)
        cluster.asked.append(bundles)

    def wait(self, timeout_seconds: float) -> bool:
        assert timeout_seconds > 0
        room = sum(fitting(node["Resources"], self.bundles[0]) for node in self.cluster.nodes())
        if self.cluster.now_s >= self.cluster.free_s and room >= len(self.bundles):
            return True
        self.cluster.now_s += timeout_seconds
        return False


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """A cluster that the command connects to."""
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    return lambda arrivals_s, free_s=0.0: Cluster(arrivals_s, free_s, monkeypatch)


def test_nodes_are_asked_for_and_awaited(make: Callable[..., Cluster]) -> None:
    cluster = make([20.0, 50.0])
    session = cluster.session(autoscale_timeout_s=6000)
    session.start()
    assert not cluster.asked, "the first stages need no GPU"
    session.wait_for("train", session.group())

    assert cluster.asked == [[{"CPU": 2.0, "GPU": 1.0}] * 4]
    assert not cluster.groups, "nothing is kept when they are there"
    assert cluster.now_s == 50
    assert cluster.lines == [
        "  train waits for 4 x (2 CPU, 1 GPU), and 0 of 0 CPUs are free (10 of 6000 s)",
        "  train waits for 4 x (2 CPU, 1 GPU), and 8 of 8 CPUs and 2 of 2 GPUs are "
        "free (20 of 6000 s)",
        "  train waits for 4 x (2 CPU, 1 GPU), and 8 of 8 CPUs and 2 of 2 GPUs are "
        "free (40 of 6000 s)",
    ]


@pytest.mark.parametrize("when", ["while Ray starts", "later"])
def test_sigterm_interrupts_a_command_as_ctrl_c_does(
    make: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def end(number: int, _: object) -> None:
        sys.exit(number)

    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, end)  # as Ray does
        if when == "while Ray starts":
            signal.raise_signal(signal.SIGTERM)

    def run() -> None:
        cluster.session().start()
        signal.raise_signal(signal.SIGTERM)

    cluster, before = make([0.0, 0.0]), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", init)
    try:
        with pytest.raises(KeyboardInterrupt, match="ended by SIGTERM"):
            run()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nodes_that_do_not_come_end_the_wait_with_a_sentence(make: Callable[..., Cluster]) -> None:
    cluster = make([20.0])
    session = cluster.session(autoscale_timeout_s=100, wait_timeout_s=50)
    with pytest.raises(UserError, match=r"2 of 2 GPUs are free after 100 s .* see `ray status`"):
        session.wait_for("train", session.group())

    assert cluster.now_s == 100
    assert not cluster.groups


def test_without_an_autoscaler_a_small_cluster_is_refused_at_once(
    make: Callable[..., Cluster],
) -> None:
    cluster = make([])
    sentence = (
        "cluster.num_workers=4 x cpus_per_worker=2 needs 8 CPUs and the cluster has 0; lower "
        "num_workers, or add nodes; where an autoscaler adds them, set cluster.autoscale_timeout_s"
    )
    with pytest.raises(UserError, match=re.escape(sentence)):
        cluster.session().start()
    assert (cluster.now_s, cluster.asked) == (0, [])


def test_a_local_ray_is_refused_though_an_autoscaler_would_add_nodes_elsewhere(
    make: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make([0.0])
    monkeypatch.delenv("RAY_ADDRESS")
    sentence = "needs as many GPUs and the cluster has 2: a local one .* RAY_ADDRESS is not set"
    with pytest.raises(UserError, match=sentence):
        cluster.session(autoscale_timeout_s=6000, cpus_per_worker=1).start()
    assert (cluster.now_s, cluster.asked) == (0, [])


def test_a_stage_waits_for_what_others_hold_and_says_so(make: Callable[..., Cluster]) -> None:
    cluster = make([0.0, 0.0], 95.0)
    session = cluster.session()
    session.wait_for("train", session.group())

    assert cluster.now_s == 100
    assert not cluster.groups
    waits = [int(re.findall(r"\((\d+) of 3600 s\)$", line)[0]) for line in cluster.lines]
    assert waits == [10, 20, 40, 80]
    assert cluster.lines[0].startswith(
        "  train waits for 4 x (2 CPU, 1 GPU), and 0 of 16 CPUs and 0 of 4 GPUs are free"
    )


def test_a_wait_has_an_end(make: Callable[..., Cluster]) -> None:
    cluster = make([0.0, 0.0], 1e9)
    session = cluster.session(wait_timeout_s=50)
    with pytest.raises(UserError, match=r"^ingest waits for 1 CPU, and 0 of 16 CPUs .* after 50 s"):
        session.wait_for("ingest", [{"CPU": 1.0}])
    assert not cluster.groups


def test_a_cluster_of_ones_own_is_not_waited_for(
    make: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make([0.0], 1e9)
    monkeypatch.delenv("RAY_ADDRESS")
    session = cluster.session(num_workers=2)
    session.wait_for("ingest", [{"CPU": 1.0}])
    session.wait_for("content", [{"CPU": 8.0, "GPU": 0.0}])
    with pytest.raises(UserError, match="content asks for 9 CPU, 0 GPU for a process.* has 8 CPU"):
        session.wait_for("content", [{"CPU": 9.0, "GPU": 0.0}])
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 2.0}] * 8, "needs 4 CPU on a node for each, and the 8 nodes .* have room for 0"),
        ([{"CPU": 7.0}] * 2, "num_workers=3 needs 4 CPU .* the 2 nodes .* have room for 2"),
        ([{"CPU": 4.0}] * 2, "num_workers=3 x cpus_per_worker=4 needs 12 CPUs and .* has 8"),
        ([{"CPU": 4.0}, {"CPU": 8.0}, {"memory": 1.0}], None),
    ],
)
def test_a_rank_fits_on_one_node(nodes: Sequence[dict[str, float]], expected: str | None) -> None:
    found = lacking_resources(nodes, ClusterConfig(num_workers=3, cpus_per_worker=4))
    assert found is None if expected is None else re.search(expected, found or "")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("max 100000", 16),
        ("9900000 100000", 16),
        ("", 16),
    ],
)
def test_a_container_has_the_cpus_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(cluster_module, "CPU_QUOTA", tmp_path / "cpu.max")
    assert usable_cpus() == 16, "no control groups"
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cpus() == expected


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_an_address_that_stages_cannot_work_through_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"^RAY_ADDRESS={address} .* submit the command as a job"):
        RaySession(ClusterConfig()).start()


def test_a_relative_path_is_refused_on_a_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"data.root": Path("/data"), "--out": Path("runs")}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    require_absolute(paths)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match="^--out=runs is relative, and with RAY_ADDRESS set"):
        require_absolute(paths)


@pytest.mark.integration
def test_waiting_for_what_another_job_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "POLL_S", 1.0)
    head = RayCluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "node_ip_address": cluster_module.LOOPBACK,
            "include_dashboard": False,
        },
    )
    try:
        monkeypatch.setenv("RAY_ADDRESS", head.address)
        ray.init(log_to_driver=False, namespace="other")
        holder = ray.remote(Holder).options(num_cpus=2, lifetime="detached", name="holder")
        ray.get(holder.remote().__ray_ready__.remote())
        ray.shutdown()

        lines: list[str] = []
        config = ClusterConfig(num_workers=2, wait_timeout_s=4)
        with RaySession(config, say=lines.append) as session:
            with pytest.raises(UserError, match="train waits for 2 x .1 CPU., and 0 of 2 CPUs"):
                session.wait_for("train", session.group())
            assert lines
            ray.kill(ray.get_actor("holder", namespace="other"))
            session.wait_for("train", session.group())
            assert ray.get(ray.remote(times).options(num_cpus=2).remote(2, 3), timeout=60) == 6
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        head.shutdown()

"""A worker group of Ray Train and its command: interrupts, and a cluster without room for it."""

import signal
from pathlib import Path

import pytest
import ray

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline import worker_group
from pipeline.config import ClusterConfig

CLUSTER = ClusterConfig(num_workers=1)


class _Job(StrictConfig):
    pass


def _worker() -> worker_group.Worker:
    """Does nothing; made here, since processes of Ray cannot import a module of tests."""
    return lambda config: None


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_interrupts_are_the_commands_own_after_a_training(tmp_path: Path) -> None:
    """Ray Train's handler stayed: it swallowed two interrupts, and the third ended with code 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        worker_group.run_workers(_worker(), _Job(), CLUSTER, tmp_path)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_group_that_finds_no_room_says_what_it_needs_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(worker_group, "MIN_START_S", worker_group.START_S)
    cpus = ray.cluster_resources()["CPU"]
    other = ray.util.placement_group([{"CPU": cpus}])
    assert other.wait(60)
    try:
        with pytest.raises(UserError) as raised:
            worker_group.run_workers(_worker(), _Job(), CLUSTER, tmp_path)
    finally:
        ray.util.remove_placement_group(other)

    said = str(raised.value)
    assert "cluster.num_workers=1 workers with 1 CPU each, in 2 attempts" in said
    assert f"now 0 of {cpus:g} CPUs are free" in said
    assert "wait for the jobs that hold the rest" in said


@pytest.mark.parametrize(("autoscale_s", "starts"), [(None, 5), (30.0, 5), (900.0, 15)])
def test_a_group_waits_as_long_as_an_autoscaler_may_take(
    autoscale_s: float | None, starts: int
) -> None:
    cluster = ClusterConfig(num_workers=1, autoscale_timeout_s=autoscale_s)
    assert worker_group._starts(cluster) == starts

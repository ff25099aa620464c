"""Stages of the command line without Ray, for tests of what does not depend on it."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import pytest
import torch.distributed as dist

from pipeline import plan, tasks, train
from pipeline.cluster import RaySession


def _results_here(
    run: Callable[[Any, Any], Iterable[Any]], tasks: Sequence[Any], shared: Any, **_: Any
) -> Iterator[Any]:
    """`stream_results`, the last task first: they finish in any order."""
    for task in reversed(tasks):
        yield from run(task, shared)


class _Remote:
    """A remote function, in this process."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.remote = run

    def options(self, **_: float) -> Self:
        return self


class _RayHere:
    """As much of Ray as planning uses: one node of two CPUs."""

    get = staticmethod(lambda value: value)
    remote = _Remote

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]


class _TrainerHere:
    """A Ray Train worker group of one rank, in this process."""

    def __init__(
        self,
        worker: Callable[[dict[str, str]], None],
        *,
        train_loop_config: dict[str, str],
        scaling_config: Any,
        **_: Any,
    ) -> None:
        assert scaling_config.num_workers == 1
        assert not scaling_config.use_gpu
        self._worker, self._config = worker, train_loop_config

    def fit(self) -> None:
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._worker(self._config)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Commands of single-rank recipes start neither Ray nor processes: a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaySession, "start", lambda self: None)
        patch.setattr(plan, "ray", _RayHere)
        patch.setattr(tasks, "stream_results", _results_here)
        patch.setattr(train, "TorchTrainer", _TrainerHere)
        yield
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()

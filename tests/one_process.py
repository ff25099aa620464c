"""Stages of the command line without Ray, for tests of what does not depend on it."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from multimodal.content_config import TokenStage
from pipeline import devices, plan, tasks, worker_group
from pipeline.cluster import RaySession
from pipeline.content import stage as content
from pipeline.content import tasks as content_tasks
from tests.distributed import run_distributed


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


class _RayHere:
    """As much of Ray as planning uses: one node of two CPUs."""

    get = staticmethod(lambda value: value)

    @staticmethod
    def remote(**_: float) -> type[_Remote]:
        return _Remote

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]


class _TrainerHere:
    """A Ray Train worker group: one rank in this process, or several that are forked."""

    def __init__(
        self,
        worker: Callable[[dict[str, str]], None],
        *,
        train_loop_config: dict[str, str],
        scaling_config: Any,
        **_: Any,
    ) -> None:
        assert not scaling_config.use_gpu
        self._worker, self._config = worker, train_loop_config
        self._num_workers = scaling_config.num_workers

    def fit(self) -> None:
        if self._num_workers > 1:
            run_distributed(self._worker, self._num_workers, self._config)
            return
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._worker(self._config)


def encode_here(
    tasks: list[content_tasks.EncodeTask], settings: content_tasks.EncoderSettings, _: TokenStage
) -> Iterator[int]:
    """`pipeline.content.workers.encode_on_workers` in this process, the last task first."""
    encode = content_tasks.TokenWriter(settings) if tasks else None
    for task in reversed(tasks):
        assert encode is not None
        yield from encode(task)


@contextmanager
def in_one_process() -> Iterator[None]:
    """Commands start no Ray, and recipes of one rank no process: a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RaySession, "start", lambda self: None)
        patch.setattr(plan, "ray", _RayHere)
        patch.setattr(tasks, "stream_results", _results_here)
        patch.setattr(devices, "ray", SimpleNamespace(get_gpu_ids=list))
        patch.setattr(worker_group, "WorkerGroupTrainer", _TrainerHere)
        patch.setattr(content, "encode_on_workers", encode_here)
        try:
            yield
        finally:
            if dist.is_initialized():
                gc.collect()
                dist.destroy_process_group()

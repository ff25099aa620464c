"""Runs a sharding plan on the current process group and takes its times and its memory."""

# Shapes: B samples, D embedding dim, N events.

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding.batch import RankingBatch
from embedding.config import ShardingConfig, SparseOptimizer, StrictConfig
from embedding.feature_schema import FeatureSchema
from embedding.planning.plan_description import PlanDescription
from embedding.shard import Sharded, shard
from embedding.tables import EmbeddedBatch, EmbeddingTables

GRADIENT_SCALE = 1e-6
"""Keeps the tables' values small over thousands of steps without a real loss."""


class StepTimes(StrictConfig):
    """Medians over steps of the slowest rank."""

    step_s: float
    """A whole step, nothing between its parts."""
    phase_s: dict[str, float]
    """Parts of a step, with a barrier between them; `assembly` and `optimizer` are no exchange."""
    num_steps: int
    halves_s: tuple[float, float]
    """`step_s` of every other round, and of the rest: what it is good to."""


class TablesStep(nn.Module):
    """A model that is nothing but its tables: the sparse part of a step."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.tables = EmbeddingTables(schema, torch.device("meta"))

    def forward(self, batch: RankingBatch) -> Tensor:
        """A scalar that every looked-up vector has a gradient of."""
        return tables_loss(self.tables(batch))


def tables_loss(embedded: EmbeddedBatch) -> Tensor:
    """Sum of all vectors, scaled."""
    total = embedded.fields_BD.sum() if embedded.field_names else torch.zeros(())
    for vectors_ND in embedded.sequences.values():
        total = total + vectors_ND.sum()
    return total * GRADIENT_SCALE


class PlanRun:
    """One plan, sharded and ready to step."""

    def __init__(
        self,
        schema: FeatureSchema,
        plan: PlanDescription,
        *,
        optimizer: SparseOptimizer,
        sharding: ShardingConfig,
        batches: Sequence[RankingBatch],
        device: torch.device,
    ) -> None:
        self.device = device
        self.batches = batches
        self._next = 0
        ranks_per_host = plan.ranks_per_host or plan.world_size
        self.sharded: Sharded = shard(
            TablesStep(schema),
            optimizer=optimizer,
            sharding=sharding.model_copy(update={"ranks_per_host": ranks_per_host}),
            dense_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            device=device,
            plan=plan,
        )
        self.sharded.initialize(seed=0)
        # Optimizer states are zero pages of the kernel until training touches every row.
        for piece in self.sharded.shards:
            for state in piece.states.values():
                state.fill_(0)

    def step(self) -> None:
        """One training step on the next batch."""
        self.sharded.optimizer.zero_grad()
        self.sharded.model(self._batch()).backward()
        self.sharded.optimizer.step()

    def time_step(self) -> float:
        """Seconds of a step, from a barrier to the end on this rank."""
        self._meet()
        started = time.perf_counter()
        self.step()
        self._synchronize()
        return time.perf_counter() - started

    def time_phases(self) -> dict[str, float]:
        """Seconds of every part of a step, with a barrier before each."""
        seconds: dict[str, float] = {}
        batch = self._batch()
        tables: Any = self.sharded.model.module.tables
        self.sharded.optimizer.zero_grad()
        pooled: list[Any] = []
        unpooled: list[Any] = []
        for module, features, results in _collections(tables, batch, pooled, unpooled):
            context = module.create_context()
            with self._timed(seconds, "input_dist"):
                distributed = module.input_dist(context, features).wait().wait()
            with self._timed(seconds, "lookup"):
                looked_up = module.compute(context, distributed)
            with self._timed(seconds, "output_dist"):
                result = module.output_dist(context, looked_up).wait()
                # A lazy result waits when it is first read.
                result = result[0] if isinstance(result, tuple) else result
                result.keys()
            results.append(result)
        with self._timed(seconds, "assembly"):
            loss = tables_loss(tables.assembly(pooled, unpooled, batch))
        with self._timed(seconds, "backward"):
            loss.backward()
        with self._timed(seconds, "optimizer"):
            self.sharded.optimizer.step()
        return seconds

    def _batch(self) -> RankingBatch:
        batch = self.batches[self._next % len(self.batches)]
        self._next += 1
        return batch

    def _meet(self) -> None:
        self._synchronize()
        dist.barrier()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, seconds: dict[str, float], name: str) -> "_Clock":
        return _Clock(self, seconds, name)


class _Clock:
    def __init__(self, run: PlanRun, seconds: dict[str, float], name: str) -> None:
        self.run, self.seconds, self.name = run, seconds, name

    def __enter__(self) -> None:
        self.run._meet()
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.run._synchronize()
        spent = time.perf_counter() - self.started
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent


def _collections(
    tables: Any, batch: RankingBatch, pooled: list[Any], unpooled: list[Any]
) -> Iterator[tuple[Any, Any, list[Any]]]:
    for module in (tables.pooled, tables.managed_pooled):
        if module is not None:
            yield module, batch.pooled, pooled
    for module in (*tables.unpooled.values(), *tables.managed_unpooled.values()):
        yield module, batch.unpooled, unpooled


def time_plans(
    runs: Sequence[PlanRun],
    *,
    warmup: int,
    rounds: int,
    steps_per_round: int,
    min_seconds: float = 0.0,
) -> list[StepTimes]:
    """Median times of several plans that take turns, so that a slow moment meets them all.

    Args:
        runs: the plans.
        warmup: steps of each before it counts.
        rounds: turns of each, at least; two or more.
        steps_per_round: whole steps of a turn; its phases are timed once.
        min_seconds: go on until all turns together have taken so long.
    """
    for run in runs:
        for _ in range(warmup):
            run.step()
    steps: list[list[list[float]]] = [[] for _ in runs]  # by plan and round
    phases: list[list[dict[str, float]]] = [[] for _ in runs]

    def take_turns(numbers: range) -> float:
        started = time.perf_counter()
        for number in numbers:
            forth = number // 2 % 2 == 0  # either half goes through the plans in both orders
            order = range(len(runs)) if forth else range(len(runs) - 1, -1, -1)
            for index in order:
                steps[index].append([runs[index].time_step() for _ in range(steps_per_round)])
                phases[index].append(runs[index].time_phases())
        return time.perf_counter() - started

    seconds = torch.tensor(take_turns(range(rounds)))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # all ranks go on for as many rounds
    in_all = math.ceil(rounds * max(min_seconds / float(seconds), 1.0))
    take_turns(range(rounds, in_all))
    return [
        StepTimes(
            step_s=_median_of_slowest(sum(steps[index], [])),
            halves_s=(
                _median_of_slowest(sum(steps[index][::2], [])),
                _median_of_slowest(sum(steps[index][1::2], [])),
            ),
            phase_s={
                name: _median_of_slowest([seconds[name] for seconds in phases[index]])
                for name in phases[index][0]
            },
            num_steps=in_all * steps_per_round,
        )
        for index in range(len(runs))
    ]


def _median_of_slowest(seconds: list[float]) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def measure_peak_bytes(make: Callable[[], PlanRun], steps: int, device: torch.device) -> int:
    """How far this rank's memory rises while a plan is built and run on `device`.

    On CPU the growth of the resident set; on CUDA what torch's allocator gave out.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
        before = status_bytes("VmRSS")
    run = make()
    for _ in range(steps):
        run.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return status_bytes("VmHWM") - before


def give_back_freed_memory() -> None:
    """Return freed heap pages to the kernel, so that the resident set is what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

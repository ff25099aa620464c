"""Times of the fused embedding kernel alone, and the constants that they pin down."""

# Shapes: B samples, N ids, D embedding dim, R timed cases, K counts.

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from embedding.limits import ELEMENT_BYTES
from embedding.planning.fit import fit_linear
from embedding.planning.id_distribution import draw, zipf

REPEATS = 7
WARMUP = 2
BATCHES = 3
"""Different batches that the repeats take turns with, so that no cache keeps one's rows."""
SAMPLES = 2048
_HEAD_START_CYCLES = 10_000_000
"""The device idles some milliseconds first: the host has then enqueued all that is timed."""

_FORWARD = ("lookup_bags", "lookup_ids", "lookup_bytes", "lookup_unique_bytes")
_BACKWARD = ("update_ids", "update_bytes", "update_unique_rows", "update_unique_bytes")


@dataclass(frozen=True)
class LookupCase:
    """One table to look up in."""

    rows: int
    dim: int
    pooling: int
    exponent: float
    batch_size: int = SAMPLES
    location: Literal["device", "managed"] = "device"
    """`device`, or `managed` (host memory over PCIe)."""


@dataclass(frozen=True)
class LookupTimes:
    """A lookup and its backward with the row update, with what they touched."""

    forward_s: float
    backward_s: float
    num_ids: int
    num_unique: int


@dataclass(frozen=True)
class LookupConstants:
    """Seconds per counted unit of the bare kernel, and per call of it."""

    seconds: dict[str, float]
    """By count of `embedding.planning.demand`."""
    forward_call_s: float
    backward_call_s: float

    def predict(self, case: LookupCase, times: LookupTimes) -> tuple[float, float]:
        """Seconds of the forward and of the backward of a case with such numbers of ids."""
        counts = _counts(case, times)
        forward, backward = (
            sum(self.seconds[name] * counts[name] for name in names)
            for names in (_FORWARD, _BACKWARD)
        )
        return self.forward_call_s + forward, self.backward_call_s + backward


def calibration_cases(device: torch.device) -> list[LookupCase]:
    """Cases whose times determine the constants: large enough on a GPU to fill it."""
    if device.type == "cpu":
        sizes = itertools.product((10_000, 300_000), (16, 64, 128), (1, 20), (0.0, 1.1))
        return [LookupCase(*size) for size in sizes]
    sizes = itertools.product((100_000, 4_000_000), (16, 48, 96, 192, 320), (1, 30), (0.0, 1.0))
    return [LookupCase(*size, batch_size=32_768) for size in sizes]


def fit_lookups(cases: Sequence[LookupCase], times: Sequence[LookupTimes]) -> LookupConstants:
    """Non-negative constants that come close to the times of all cases, relative to each."""
    counts = [_counts(case, found) for case, found in zip(cases, times, strict=True)]
    ahead = _fit(counts, _FORWARD, [found.forward_s for found in times])
    back = _fit(counts, _BACKWARD, [found.backward_s for found in times])
    named = zip(_FORWARD + _BACKWARD, [*ahead[1:], *back[1:]], strict=True)
    return LookupConstants(dict(named), ahead[0], back[0])


def _fit(
    counts: Sequence[dict[str, float]], names: Sequence[str], seconds: Sequence[float]
) -> list[float]:
    """Constants of a call and of the named counts."""
    counts_RK = np.array([[1.0, *(found[name] for name in names)] for found in counts])
    return [float(value) for value in fit_linear(counts_RK, np.array(seconds))]


def _counts(case: LookupCase, times: LookupTimes) -> dict[str, float]:
    """What `embedding.planning.demand` counts of such a lookup."""
    row_bytes = case.dim * ELEMENT_BYTES
    return {
        "lookup_bags": case.batch_size,
        "lookup_ids": times.num_ids,
        "lookup_bytes": times.num_ids * row_bytes,
        "lookup_unique_bytes": times.num_unique * row_bytes,
        "update_ids": times.num_ids,
        "update_bytes": times.num_ids * row_bytes,
        "update_unique_rows": times.num_unique,
        "update_unique_bytes": times.num_unique * (row_bytes + ELEMENT_BYTES),
    }


def time_lookup(case: LookupCase, device: torch.device) -> LookupTimes:
    """Median seconds of a fused table's forward, and of its backward with the update."""
    table = _table(case, device)
    rng = np.random.default_rng(case.dim + 7 * case.pooling)
    num_ids = case.batch_size * case.pooling
    batches = [draw(zipf(case.rows, case.exponent), num_ids, rng) for _ in range(BATCHES)]
    ids = [torch.from_numpy(ids_N * 7919 % case.rows).to(device) for ids_N in batches]
    offsets = torch.arange(0, num_ids + 1, case.pooling, device=device)
    grad_BD = torch.full((case.batch_size, case.dim), 1e-6, device=device)
    step = _step_on_gpu if device.type == "cuda" else _step_on_cpu
    forward, backward = [], []
    for repeat in range(REPEATS + WARMUP):
        meet(device)
        ahead_s, back_s = step(table, ids[repeat % BATCHES], offsets, grad_BD)
        forward.append(ahead_s)
        backward.append(back_s)
    unique = statistics.mean(ids_N.unique().numel() for ids_N in ids)
    return LookupTimes(
        forward_s=slowest_median(forward[WARMUP:]),
        backward_s=slowest_median(backward[WARMUP:]),
        num_ids=num_ids,
        num_unique=int(unique),
    )


def _step_on_cpu(
    table: Any, ids_N: Tensor, offsets: Tensor, grad_BD: Tensor
) -> tuple[float, float]:
    started = time.perf_counter()
    vectors_BD = table(ids_N, offsets)
    middle = time.perf_counter()
    vectors_BD.backward(grad_BD)
    return middle - started, time.perf_counter() - middle


def _step_on_gpu(
    table: Any, ids_N: Tensor, offsets: Tensor, grad_BD: Tensor
) -> tuple[float, float]:
    """By the device's own clock: in training, too, the host runs ahead of it."""
    started, middle, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    started.record()
    vectors_BD = table(ids_N, offsets)
    middle.record()
    vectors_BD.backward(grad_BD)
    ended.record()
    ended.synchronize()
    return started.elapsed_time(middle) / 1e3, middle.elapsed_time(ended) / 1e3


def _table(case: LookupCase, device: torch.device) -> Any:
    on_cpu = device.type == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation[case.location.upper()]
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    table = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(case.rows, case.dim, location, compute)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        device=device,
    )
    for weight_RD in table.split_embedding_weights():
        weight_RD.uniform_(-0.1, 0.1)
    return table


def slowest_median(seconds: list[float]) -> float:
    """Median over repeats of the slowest rank's time."""
    slowest = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def meet(device: torch.device) -> None:
    """All ranks' devices are idle and all ranks are here."""
    synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

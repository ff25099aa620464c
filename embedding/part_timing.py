"""Micro-benchmarks of the parts of a step: what pins the cost model's constants down.

Every rank of the process group runs them at once, as in training, where ranks share caches, memory
and cores.
"""

# Shapes: B samples, N ids, D embedding dim.

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

from embedding.fit import fit_linear
from embedding.id_distribution import draw, zipf

REPEATS = 7
EXCHANGED_BYTES = (1 << 16, 1 << 19, 1 << 21, 1 << 23)
LOOKUP_DIMS = (16, 64, 128)
LOOKUP_POOLINGS = (1, 20)
LOOKUP_ROWS = (10_000, 300_000)
LOOKUP_EXPONENTS = (0.0, 1.1)
SAMPLES = 2048
ELEMENT_BYTES = 4


@dataclass(frozen=True)
class LookupCase:
    """One table to look up in."""

    rows: int
    dim: int
    pooling: int
    exponent: float
    batch_size: int = SAMPLES
    location: str = "device"
    """`device`, `managed` (host memory over PCIe) or `managed_caching`."""


@dataclass(frozen=True)
class LookupTimes:
    """A lookup and its backward with the row update, with what they touched."""

    forward_s: float
    backward_s: float
    num_ids: int
    num_unique: int


def time_parts(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """Constants of `embedding.demand` that can be measured alone, in seconds per unit."""
    parts = collective_parts(device) if dist.get_world_size() > 1 else {}
    parts |= lookup_parts(device, quick=quick)
    parts["input_bucketized_ids"] = _bucketize_id_s(device)
    if device.type == "cuda":
        parts |= offloading_parts(device)
    return {name: value for name, value in parts.items() if value > 0}


def collective_parts(device: torch.device) -> dict[str, float]:
    """Seconds per byte of the exchanges, in the units in which the cost model counts them."""
    world = dist.get_world_size()
    sent = (world - 1) / world

    def exchange(elements: int) -> Callable[[], None]:
        values, out = _floats(elements, device), _floats(elements, device)
        return lambda: dist.all_to_all_single(out, values)

    def reduce_scatter(elements: int) -> Callable[[], None]:
        values, out = _floats(elements, device), _floats(elements // world, device)
        return lambda: dist.reduce_scatter_tensor(out, values)

    def all_gather(elements: int) -> Callable[[], None]:
        values, out = _floats(elements // world, device), _floats(elements, device)
        return lambda: dist.all_gather_into_tensor(out, values)

    def all_reduce(elements: int) -> Callable[[], None]:
        values = _floats(elements, device)
        return lambda: dist.all_reduce(values)

    makers = (
        ("exchange_bytes", exchange, sent),
        ("reduce_bytes", reduce_scatter, sent),
        ("backward_gather_bytes", all_gather, sent),
        ("all_reduce_bytes", all_reduce, 2 * sent),
    )
    parts = {}
    for name, make, share in makers:
        sizes, seconds = [], []
        for num_bytes in EXCHANGED_BYTES:
            elements = num_bytes // ELEMENT_BYTES // world * world
            seconds.append(time_together(make(elements), device))
            sizes.append(elements * ELEMENT_BYTES * share)
        calls = np.ones(len(sizes))
        parts[name] = float(fit_linear(np.stack([sizes, calls], axis=1), np.array(seconds))[0])
    parts["backward_exchange_bytes"] = parts["exchange_bytes"]
    return parts


def lookup_parts(device: torch.device, *, quick: bool) -> dict[str, float]:
    """Seconds per id, byte and distinct row of the fused kernel, forward and backward."""
    cases = [
        LookupCase(rows, dim, pooling, exponent)
        for rows, dim, pooling, exponent in itertools.product(
            LOOKUP_ROWS, LOOKUP_DIMS, LOOKUP_POOLINGS, LOOKUP_EXPONENTS
        )
    ]
    if quick:
        cases = cases[::3]
    forward, backward, counts_forward, counts_backward = [], [], [], []
    for case in cases:
        times = time_lookup(case, device)
        row_bytes = case.dim * ELEMENT_BYTES
        forward.append(times.forward_s)
        backward.append(times.backward_s)
        unique_bytes = times.num_unique * row_bytes
        ids, touched = times.num_ids, times.num_unique * (row_bytes + ELEMENT_BYTES)
        counts_forward.append([1.0, case.batch_size, ids, ids * row_bytes, unique_bytes])
        counts_backward.append([1.0, ids, ids * row_bytes, times.num_unique, touched])
    ahead = fit_linear(np.array(counts_forward), np.array(forward))
    back = fit_linear(np.array(counts_backward), np.array(backward))
    names_ahead = ("lookup_bags", "lookup_ids", "lookup_bytes", "lookup_unique_bytes")
    names_back = ("update_ids", "update_bytes", "update_unique_rows", "update_unique_bytes")
    # The first constants are calls of the bare kernel; TorchRec's own calls cost more.
    return dict(zip(names_ahead, map(float, ahead[1:]), strict=True)) | dict(
        zip(names_back, map(float, back[1:]), strict=True)
    )


def offloading_parts(device: torch.device) -> dict[str, float]:
    """Seconds per byte of rows that come from host memory, through UVM and through its cache."""
    case = LookupCase(4_000_000, 128, 1, 0.0, batch_size=65_536)
    near = time_lookup(case, device)
    uvm = LookupCase(4_000_000, 128, 1, 0.0, batch_size=65_536, location="managed")
    far = time_lookup(uvm, device)
    moved = far.num_unique * case.dim * ELEMENT_BYTES
    return {
        "lookup_host_bytes": max(far.forward_s - near.forward_s, 0.0) / moved,
        "update_host_bytes": max(far.backward_s - near.backward_s, 0.0) / (2 * moved),
        "prefetch_bytes": host_to_device_byte_s(device),
    }


def host_to_device_byte_s(device: torch.device, num_bytes: int = 1 << 28) -> float:
    """Of a copy from page-locked memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return time_together(lambda: target.copy_(source), device) / num_bytes


def copied_bytes_per_s(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Bytes read plus bytes written per second by a copy within the device's memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_together(lambda: target.copy_(source), device)


def time_lookup(case: LookupCase, device: torch.device) -> LookupTimes:
    """Median seconds of a fused table's forward, and of its backward with the update."""
    table = _table(case, device)
    rng = np.random.default_rng(case.dim + 7 * case.pooling)
    num_ids = case.batch_size * case.pooling
    batches = [draw(zipf(case.rows, case.exponent), num_ids, rng) for _ in range(3)]
    ids = [torch.from_numpy(ids_N * 7919 % case.rows).to(device) for ids_N in batches]
    offsets = torch.arange(0, num_ids + 1, case.pooling, device=device)
    grad_BD = torch.full((case.batch_size, case.dim), 1e-6, device=device)
    forward, backward = [], []
    for repeat in range(REPEATS + 2):
        ids_N = ids[repeat % len(ids)]
        _meet(device)
        started = time.perf_counter()
        vectors_BD = table(ids_N, offsets)
        _synchronize(device)
        middle = time.perf_counter()
        vectors_BD.backward(grad_BD)
        _synchronize(device)
        forward.append(middle - started)
        backward.append(time.perf_counter() - middle)
    unique = float(np.mean([len(np.unique(ids_N)) for ids_N in batches]))
    return LookupTimes(
        forward_s=_slowest_median(forward[2:]),
        backward_s=_slowest_median(backward[2:]),
        num_ids=num_ids,
        num_unique=int(unique),
    )


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


def _bucketize_id_s(device: torch.device) -> float:
    """Of sending ids to the owners of their rows, per id."""
    few, many = (_bucketize_s(pooling, device) for pooling in (10, 100))
    return max(many - few, 0.0) / (90 * SAMPLES)


def _bucketize_s(pooling: int, device: torch.device) -> float:
    num_rows, world = 100_000, max(dist.get_world_size(), 2)
    ids_N = torch.randint(0, num_rows, (pooling * SAMPLES,), device=device)
    lengths_B = torch.full((SAMPLES,), pooling, device=device)
    block = torch.tensor([-(-num_rows // world)], device=device)
    return time_together(
        lambda: torch.ops.fbgemm.block_bucketize_sparse_features(
            lengths_B,
            ids_N,
            bucketize_pos=False,
            sequence=False,
            block_sizes=block,
            my_size=world,
        ),
        device,
    )


def time_together(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call that all ranks make at once."""
    seconds = []
    for _ in range(REPEATS + 2):
        _meet(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return _slowest_median(seconds[2:])


def _slowest_median(seconds: list[float]) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _floats(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def _meet(device: torch.device) -> None:
    _synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

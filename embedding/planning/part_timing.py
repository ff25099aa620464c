"""Micro-benchmarks of the parts of a step: what pins the cost model's constants down.

Every rank of the process group runs them at once, as in training, where ranks share caches, memory
and cores.
"""

# Shapes: B samples, N ids.

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embedding.limits import ELEMENT_BYTES
from embedding.planning.fit import fit_linear
from embedding.planning.lookup_timing import (
    REPEATS,
    SAMPLES,
    WARMUP,
    LookupCase,
    calibration_cases,
    fit_lookups,
    meet,
    slowest_median,
    synchronize,
    time_lookup,
)

EXCHANGED_BYTES = (1 << 16, 1 << 19, 1 << 21, 1 << 23)


def time_parts(device: torch.device) -> dict[str, float]:
    """Constants of `embedding.planning.demand` that can be measured alone, in seconds per unit."""
    parts = collective_parts(device) if dist.get_world_size() > 1 else {}
    parts |= lookup_parts(device)
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


def lookup_parts(device: torch.device) -> dict[str, float]:
    """Seconds per id, byte and distinct row of the fused kernel, forward and backward."""
    cases = calibration_cases(device)
    # The calls of the bare kernel are left out: TorchRec's own cost more.
    return fit_lookups(cases, [time_lookup(case, device) for case in cases]).seconds


def offloading_parts(device: torch.device) -> dict[str, float]:
    """Seconds per byte of rows that are read and updated in host memory.

    How fast a cache in device memory is filled is not measured.
    """
    case = LookupCase(4_000_000, 128, 1, 0.0, batch_size=65_536)
    near = time_lookup(case, device)
    uvm = LookupCase(4_000_000, 128, 1, 0.0, batch_size=65_536, location="managed")
    far = time_lookup(uvm, device)
    moved = far.num_unique * case.dim * ELEMENT_BYTES
    return {
        "lookup_host_bytes": max(far.forward_s - near.forward_s, 0.0) / moved,
        "update_host_bytes": max(far.backward_s - near.backward_s, 0.0) / (2 * moved),
    }


def copied_bytes_per_s(device: torch.device, num_bytes: int = 1 << 32) -> float:
    """Bytes read plus bytes written per second by a copy within the device's memory."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_together(lambda: target.copy_(source), device)


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
    for _ in range(REPEATS + WARMUP):
        meet(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return slowest_median(seconds[WARMUP:])


def _floats(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)

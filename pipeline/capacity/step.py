"""Seconds of what a step does beside the tables: products, adding up gradients, the dense side."""

from embedding.limits import ELEMENT_BYTES
from embedding.planning.cluster_shape import ClusterShape
from pipeline.capacity.types import GPU_FLOPS_SHARE, DenseCost


def dense_seconds(dense: DenseCost, shape: ClusterShape, batch_size_per_rank: int) -> float:
    """Forward, backward and the gradients' all-reduce, which two thirds of it can hide."""
    if shape.machine.device == "cpu":
        compute = dense.cpu_seconds_per_row * batch_size_per_rank * shape.ranks_per_core
    else:
        flops = dense.flops_per_row * batch_size_per_rank
        compute = gpu_seconds(flops, shape, dense.precision)
    ring = all_reduce_seconds(dense.parameters * ELEMENT_BYTES, shape)
    return compute + max(0.0, ring - 2 / 3 * compute)


def gpu_seconds(flops: float, shape: ClusterShape, precision: str) -> float:
    """Products on one GPU of the shape."""
    machine = shape.machine
    peak = machine.flops_bf16 if precision == "bf16" else machine.flops_fp32
    return flops / (GPU_FLOPS_SHARE * peak)


def all_reduce_seconds(num_bytes: float, shape: ClusterShape) -> float:
    """A ring that adds up `num_bytes` of every rank."""
    world = shape.world_size
    return 2 * (world - 1) / world * num_bytes / _ring_bandwidth(shape)


def all_gather_seconds(num_bytes: float, shape: ClusterShape) -> float:
    """A ring after which every rank has all ranks' parts, `num_bytes` together."""
    world = shape.world_size
    return (world - 1) / world * num_bytes / _ring_bandwidth(shape)


def _ring_bandwidth(shape: ClusterShape) -> float:
    """A ring over hosts runs on all network cards of a host at once."""
    machine = shape.machine
    if shape.num_hosts == 1:
        return machine.intra_host_bandwidth
    between = machine.inter_host_bandwidth * shape.ranks_per_host
    return min(machine.intra_host_bandwidth, between)

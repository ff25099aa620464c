"""Seconds per counted piece of work: from a machine's data sheet, or from its calibration."""

import numpy as np
from pydantic import Field, model_validator

from embedding.config import StrictConfig
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.counts import COUNT_NAMES
from embedding.planning.machines import Machine

MEMORY_SHARE = 0.6
"""Share of the peak memory bandwidth that gathers of embedding rows are assumed to reach."""
LINK_SHARE = 0.8
"""Share of the peak link bandwidth that exchanges are assumed to reach."""
PCIE_GATHER_SHARE = 0.5
"""Of PCIe's peak, for rows fetched one by one."""
CORE_BANDWIDTH = 8e9
"""Bytes per second that one core of many draws or copies: not what its socket does."""
GPU_CALL_S = 60e-6
"""A handful of kernel launches, and the Python around them."""
GPU_EXCHANGE_S = 40e-6
"""Latency of one NCCL collective between a few hosts."""
CPU_CALL_S = 300e-6


class CostConstants(StrictConfig):
    """One positive constant per count of `embedding.planning.demand`, in seconds per unit."""

    source: str
    """`data sheet`, or the calibration it comes from."""
    seconds: dict[str, float]
    step_s: float = 0.0
    """Of every step, whatever the plan."""
    assembly_byte_s: float = 0.0
    """Per byte of the looked-up fields of one rank's batch: their concatenation, and back."""
    cores_per_host: int | None = None
    """On CPU: more ranks than cores take turns."""
    process_bytes: int = Field(default=0, ge=0)
    """Memory of every rank that the first step brings in, whatever the tables."""

    @model_validator(mode="after")
    def _check_names(self) -> "CostConstants":
        unknown = set(self.seconds) - set(COUNT_NAMES)
        if unknown or any(value < 0 for value in self.seconds.values()):
            raise ValueError(f"constants must be >= 0 and of known counts; unknown: {unknown}")
        return self

    def vector(self) -> np.ndarray:
        """In the order of `COUNT_NAMES`; 0 where a constant is not there."""
        return np.array([self.seconds.get(name, 0.0) for name in COUNT_NAMES])


def data_sheet_constants(shape: ClusterShape) -> CostConstants:
    """What a plan is judged by where nothing was measured: peaks of the sheet, times usual shares.

    Trust its ranking of plans more than its seconds.
    """
    machine = shape.machine
    on_gpu = machine.device == "cuda"
    call = GPU_CALL_S if on_gpu else CPU_CALL_S
    exchange = GPU_EXCHANGE_S if on_gpu else CPU_CALL_S
    memory = 1 / (MEMORY_SHARE * machine.hbm_bandwidth)
    if not on_gpu:
        share = MEMORY_SHARE * machine.hbm_bandwidth / shape.ranks_per_host
        memory = 1 / min(share, CORE_BANDWIDTH)
    near = 1 / (LINK_SHARE * machine.intra_host_bandwidth)
    far = 1 / (LINK_SHARE * machine.inter_host_bandwidth)
    seconds = {
        "input_calls": 3 * exchange + call,
        "input_sent_ids": 8 * (4 * memory + near),
        "input_received_ids": 8 * 4 * memory,
        "input_lengths": 4 * (4 * memory + near),
        "input_bucketized_ids": 8 * 6 * memory,
        "input_managed_ids": 8 * 40 * memory,
        "input_inter_bytes": far,
        "lookup_calls": call,
        "lookup_bags": 8 * memory,
        "lookup_ids": 8 * memory,
        "lookup_bytes": 0.25 * memory,
        "lookup_unique_bytes": 0.75 * memory,
        "replicated_lookup_bytes": memory,
        "exchange_calls": exchange,
        "exchange_bytes": near,
        "reduce_calls": exchange,
        "reduce_bytes": near,
        "output_inter_bytes": far,
        "output_bytes": 2 * memory,
        "backward_calls": 2 * call,
        "backward_exchange_bytes": near,
        "backward_gather_bytes": near,
        "backward_inter_bytes": far,
        "update_ids": 8 * 8 * memory,
        "update_bytes": memory,
        "update_unique_rows": 64 * memory,
        "update_unique_bytes": 2 * memory,
        "replicated_calls": exchange + call,
        "replicated_table_bytes": 4 * memory,
        "replicated_update_bytes": 3 * memory,
        "all_reduce_bytes": near,
        "all_reduce_inter_bytes": far,
    }
    seconds |= _offloading(machine, call)
    return CostConstants(
        source="data sheet",
        seconds=seconds,
        step_s=call,
        assembly_byte_s=3 * memory,
        cores_per_host=shape.cores_per_host,
    )


def _offloading(machine: Machine, call: float) -> dict[str, float]:
    gather = 1 / (PCIE_GATHER_SHARE * machine.pcie_bandwidth)
    return {
        "prefetch_calls": 3 * call,
        "prefetch_ids": 8 * 10 / (MEMORY_SHARE * machine.hbm_bandwidth),
        "prefetch_bytes": gather,
        "lookup_host_bytes": gather,
        "update_host_bytes": gather,
    }

"""The machines that plans can be made for, with the figures of their public data sheets.

Bandwidths are peaks in bytes per second and one direction; what programs reach of them is the cost
model's matter (`embedding.planning.cost_constants`), or a calibration's.
"""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from embedding.config import StrictConfig

GIB = 1 << 30
GB = 1e9
TB = 1e12


class Machine(StrictConfig):
    """One kind of rank (a GPU, or a process on a CPU) and the host it sits in."""

    name: str
    """As in `h200:2x8`; of a YAML file its name without a suffix."""
    base: str | None = None
    """The known machine that a YAML file changes."""
    device: Literal["cuda", "cpu"]
    ranks_per_host: PositiveInt
    """Ranks of a full host."""
    hbm_bytes: NonNegativeInt
    """Device memory of one rank, as its driver counts it (an `80 GB` GPU has nearly 80 GiB, ECC
    takes a sixteenth of GDDR6); 0 on CPU, where tables live in host memory."""
    hbm_bandwidth: PositiveFloat
    """Of one rank's device memory; on CPU of one host's memory."""
    host_bytes: NonNegativeInt
    """Memory of one host; 0: that of the machine that plans."""
    intra_host_bandwidth: PositiveFloat
    """Of one rank to the other ranks of its host."""
    inter_host_bandwidth: PositiveFloat
    """Of one rank to other hosts: its network card, or its share of the host's."""
    pcie_bandwidth: PositiveFloat
    """Of one rank to its host's memory."""
    flops_fp32: PositiveFloat
    """Dense fp32 matrix products of one rank, per second (no TF32)."""
    flops_bf16: PositiveFloat
    price_per_hour: NonNegativeFloat | None = None
    """Of one host, in any currency; without it no cost is reported."""
    device_names: tuple[str, ...] = ()
    """What the name by which CUDA reports this device holds, from the start of a word on; where
    several machines' names hold, the longest counts."""
    source: str
    """The data sheet, and what it leaves open."""


_HOPPER = {
    "device": "cuda",
    "ranks_per_host": 8,
    "host_bytes": 2048 * GIB,
    "intra_host_bandwidth": 450 * GB,
    "inter_host_bandwidth": 50 * GB,
    "pcie_bandwidth": 64 * GB,
    "flops_fp32": 67 * TB,
    "flops_bf16": 989 * TB,
}
_AMPERE = {
    "device": "cuda",
    "ranks_per_host": 8,
    "intra_host_bandwidth": 300 * GB,
    "inter_host_bandwidth": 25 * GB,
    "pcie_bandwidth": 32 * GB,
    "flops_fp32": 19.5 * TB,
    "flops_bf16": 312 * TB,
}
# NVLink bridges join two cards, or four. All ranks of a host exchange with one another, so what
# counts is their slowest link.
_CARD_HOST = (
    "its host (1 TB, half the network of the SXM system, PCIe between GPUs that no bridge joins) "
    "is an assumption, as the sheet fixes none"
)
_HOPPER_CARD = _HOPPER | {
    "host_bytes": 1024 * GIB,
    "intra_host_bandwidth": 64 * GB,
    "inter_host_bandwidth": 25 * GB,
}
_AMPERE_CARD = _AMPERE | {
    "host_bytes": 1024 * GIB,
    "intra_host_bandwidth": 32 * GB,
    "inter_host_bandwidth": 12.5 * GB,
}

MACHINES: tuple[Machine, ...] = (
    Machine.model_validate(
        _HOPPER
        | {
            "name": "h100",
            "hbm_bytes": 80 * GIB,
            "hbm_bandwidth": 3350 * GB,
            "device_names": ("H100",),
            "source": "NVIDIA H100 Tensor Core GPU data sheet (SXM) and DGX H100 data sheet: "
            "3.35 TB/s, NVLink 900 GB/s both ways, 400 Gb/s network per GPU, 2 TB host memory",
        }
    ),
    Machine.model_validate(
        _HOPPER
        | {
            "name": "h200",
            "hbm_bytes": 139 * GIB,
            "hbm_bandwidth": 4800 * GB,
            "device_names": ("H200",),
            "source": "NVIDIA H200 Tensor Core GPU data sheet (SXM) and DGX H200 data sheet: "
            "141 GB at 4.8 TB/s, NVLink 900 GB/s both ways, 400 Gb/s network per GPU",
        }
    ),
    Machine.model_validate(
        _HOPPER_CARD
        | {
            "name": "h100-pcie",
            "hbm_bytes": 80 * GIB,
            "hbm_bandwidth": 2000 * GB,
            "flops_fp32": 51 * TB,
            "flops_bf16": 756 * TB,
            "device_names": ("H100 PCIe",),
            "source": "NVIDIA H100 Tensor Core GPU data sheet (PCIe): 80 GB at 2 TB/s, "
            f"1,513 bf16 TFLOPS with sparsity, PCIe 5.0 x16; {_CARD_HOST}",
        }
    ),
    Machine.model_validate(
        _HOPPER_CARD
        | {
            "name": "h100-nvl",
            "hbm_bytes": 93 * GIB,
            "hbm_bandwidth": 3900 * GB,
            "flops_fp32": 60 * TB,
            "flops_bf16": 835 * TB,
            "device_names": ("H100 NVL",),
            "source": "NVIDIA H100 Tensor Core GPU data sheet (NVL): 94 GB at 3.9 TB/s, "
            f"1,671 bf16 TFLOPS with sparsity, PCIe 5.0 x16; {_CARD_HOST}",
        }
    ),
    Machine.model_validate(
        _HOPPER_CARD
        | {
            "name": "h200-nvl",
            "hbm_bytes": 139 * GIB,
            "hbm_bandwidth": 4800 * GB,
            "flops_fp32": 60 * TB,
            "flops_bf16": 835 * TB,
            "device_names": ("H200 NVL",),
            "source": "NVIDIA H200 Tensor Core GPU data sheet (NVL): 141 GB at 4.8 TB/s, "
            f"1,671 bf16 TFLOPS with sparsity, PCIe 5.0 x16; {_CARD_HOST}",
        }
    ),
    Machine.model_validate(
        _AMPERE
        | {
            "name": "a100-40",
            "hbm_bytes": 40 * GIB,
            "hbm_bandwidth": 1555 * GB,
            "host_bytes": 1024 * GIB,
            "device_names": ("A100-SXM4-40GB",),
            "source": "NVIDIA A100 Tensor Core GPU data sheet (SXM 40 GB) and DGX A100 data sheet: "
            "1,555 GB/s, NVLink 600 GB/s both ways, 200 Gb/s network per GPU, 1 TB host memory",
        }
    ),
    Machine.model_validate(
        _AMPERE
        | {
            "name": "a100-80",
            "hbm_bytes": 80 * GIB,
            "hbm_bandwidth": 2039 * GB,
            "host_bytes": 2048 * GIB,
            "device_names": ("A100-SXM4-80GB",),
            "source": "NVIDIA A100 Tensor Core GPU data sheet (SXM 80 GB) and DGX A100 data sheet: "
            "2,039 GB/s, NVLink 600 GB/s both ways, 200 Gb/s network per GPU, 2 TB host memory",
        }
    ),
    Machine.model_validate(
        _AMPERE_CARD
        | {
            "name": "a100-40-pcie",
            "hbm_bytes": 40 * GIB,
            "hbm_bandwidth": 1555 * GB,
            "device_names": ("A100-PCIE-40GB",),
            "source": "NVIDIA A100 Tensor Core GPU data sheet (PCIe 40 GB): 1,555 GB/s, "
            f"PCIe 4.0 x16; {_CARD_HOST}",
        }
    ),
    Machine.model_validate(
        _AMPERE_CARD
        | {
            "name": "a100-80-pcie",
            "hbm_bytes": 80 * GIB,
            "hbm_bandwidth": 1935 * GB,
            "device_names": ("A100 80GB PCIe", "A100-PCIE-80GB"),
            "source": "NVIDIA A100 Tensor Core GPU data sheet (PCIe 80 GB): 1,935 GB/s, "
            f"PCIe 4.0 x16; {_CARD_HOST}",
        }
    ),
    Machine(
        name="l40s",
        device="cuda",
        ranks_per_host=8,
        hbm_bytes=44 * GIB,
        hbm_bandwidth=864 * GB,
        host_bytes=1024 * GIB,
        intra_host_bandwidth=32 * GB,
        inter_host_bandwidth=12.5 * GB,
        pcie_bandwidth=32 * GB,
        flops_fp32=91.6 * TB,
        flops_bf16=362 * TB,
        device_names=("L40S",),
        source="NVIDIA L40S data sheet: 48 GB with ECC at 864 GB/s, PCIe 4.0 x16, no NVLink; the "
        "host (1 TB, 100 Gb/s network per GPU) is an assumption, as the sheet fixes none",
    ),
    Machine(
        name="v100",
        device="cuda",
        ranks_per_host=8,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=900 * GB,
        host_bytes=512 * GIB,
        intra_host_bandwidth=150 * GB,
        inter_host_bandwidth=6.25 * GB,
        pcie_bandwidth=16 * GB,
        flops_fp32=15.7 * TB,
        flops_bf16=15.7 * TB,
        device_names=("V100",),
        source="NVIDIA V100 Tensor Core GPU data sheet (SXM2 32 GB) and DGX-1 data sheet: "
        "900 GB/s, NVLink 300 GB/s both ways, 4 x 100 Gb/s network, two sockets of four channels "
        "DDR4-2133 a host; no bf16 units",
    ),
    Machine(
        name="cpu",
        device="cpu",
        ranks_per_host=64,
        hbm_bytes=0,
        hbm_bandwidth=460.8 * GB,
        host_bytes=0,
        intra_host_bandwidth=10 * GB,
        inter_host_bandwidth=12.5 * GB,
        pcie_bandwidth=64 * GB,
        flops_fp32=0.1 * TB,
        flops_bf16=0.2 * TB,
        source="AMD EPYC 9004 series data sheet (12 channels DDR5-4800 a socket); one core a rank, "
        "loopback and memory size of the machine that plans are assumptions: calibrate",
    ),
)

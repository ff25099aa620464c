"""Tests of what only a GPU can show: elsewhere each of them is skipped, and says why."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: these tests run on a GPU host, after `make ACCEL=gpu demo`")


@pytest.fixture(scope="session")
def cuda(_needs_cuda: None) -> torch.device:
    """The device, with products and convolutions in full float32, as on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.cuda.set_device(0)
    return torch.device("cuda:0")


@pytest.fixture(scope="session")
def group(cuda: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """A process group of one rank, with the backends of a training on GPUs."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ["LOCAL_RANK"] = "0"
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield cuda
    # Pipelines and DDP hold process groups in reference cycles (see tests/distributed.py).
    gc.collect()
    dist.destroy_process_group()

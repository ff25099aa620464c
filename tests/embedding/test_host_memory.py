"""A container's limit counts as the machine's memory, in planning for CPU and GPU hosts alike."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from embedding.config import ShardingConfig
from embedding.planning import host_memory
from embedding.planning.host_memory import group_limits, memory_of_this_machine
from embedding.planning.this_machine import local_shape

GIB = 1 << 30


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        # Version 2: a group inside one with a lower limit; `max` is none.
        ("0::/pod/job\n", {"pod/memory.max": "3\n", "pod/job/memory.max": "5\n"}, [3, 5]),
        ("0::/pod/job\n", {"pod/job/memory.max": "max\n"}, []),
        # Version 1: the controller's own hierarchy, beside others.
        (
            "3:cpu,cpuacct:/job\n2:memory:/job\n0::/\n",
            {"memory/job/memory.limit_in_bytes": "7\n", "cpu/job/memory.limit_in_bytes": "1\n"},
            [7],
        ),
        # In a container the path may be the host's, and its own group is the root.
        ("5:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "9\n"}, [9]),
        ("0::/\n", {"memory.max": "4\n"}, [4]),
    ],
)
def test_limits_are_those_of_the_group_and_of_the_groups_around_it(
    tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]
) -> None:
    path = tmp_path / "cgroup"
    path.write_text(membership)
    root = written(tmp_path / "groups", files)
    assert list(group_limits(path, root)) == limits


def test_without_control_groups_the_memory_is_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_MEMBERSHIP", tmp_path / "none")
    assert memory_of_this_machine() == psutil.virtual_memory().total


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_host_is_planned_for_with_the_memory_its_container_has(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    written(tmp_path, {"memory.max": str(GIB)})
    monkeypatch.setattr(host_memory, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_CONTROL_GROUPS", tmp_path)
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)

    shape = local_shape(ShardingConfig(), 2, device)

    assert shape.host_bytes_per_rank == GIB // 2
    assert shape.device_bytes == (GIB // 2 if device == "cpu" else 80 * GIB)

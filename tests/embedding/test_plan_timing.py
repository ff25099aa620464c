"""What is measured of a running plan."""

from types import SimpleNamespace

import pytest
import torch

from embedding.planning.plan_timing import measure_peak_bytes

HELD_BYTES = 64 << 20


def test_memory_of_a_run_on_cpu_is_the_resident_set_though_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    held = []
    run = SimpleNamespace(step=lambda: held.append(torch.ones(HELD_BYTES // 4)))

    peak = measure_peak_bytes(lambda: run, 2, torch.device("cpu"))

    assert 2 * HELD_BYTES <= peak < 3 * HELD_BYTES


def test_memory_of_a_run_on_a_gpu_is_asked_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two GPUs."""
    peaks = {"reset": [], "held": {"cuda:0": (5, 7), "cuda:1": (100, 170)}}
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device=None: peaks["reset"].append(device)
    )
    for index, name in enumerate(("memory_allocated", "max_memory_allocated")):
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda device="cuda:0", index=index: peaks["held"][str(device)][index],
        )
    second = torch.device("cuda", 1)
    assert measure_peak_bytes(lambda: SimpleNamespace(step=lambda: None), 1, second) == 70
    assert peaks["reset"] == [second]

"""The device of a worker process, from what Ray gave it and what is visible."""

import pytest
import ray
import torch

from pipeline.devices import own_device


@pytest.mark.parametrize(
    ("given", "visible", "expected"),
    [
        ([], "", "cpu"),
        ([0], "0", "cuda:0"),
        ([3], "3", "cuda:0"),  # an actor sees its own GPU only
        ([3], "0,1,2,3", "cuda:3"),
        (["3"], "2,3", "cuda:1"),
        (["GPU-b"], "GPU-a,GPU-b", "cuda:1"),
        ([2], None, "cuda:2"),
    ],
)
def test_the_own_gpu_is_counted_among_the_visible_ones(
    monkeypatch: pytest.MonkeyPatch, given: list[int | str], visible: str | None, expected: str
) -> None:
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert own_device() == torch.device(expected)

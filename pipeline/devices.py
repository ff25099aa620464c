"""Which device a worker process computes on."""

import os

import ray
import torch


def own_device() -> torch.device:
    """The GPU that Ray gave this process, a rank of Ray Train or an actor; else the CPU.

    `ray.train.torch.get_device` says the same, but refuses to outside of Ray Train. Ray Train shows
    a rank all GPUs of its host, so the own one need not be the first visible.
    """
    given = [str(gpu) for gpu in ray.get_gpu_ids()]
    if not given:
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = int(given[0]) if visible is None else visible.split(",").index(given[0])
    return torch.device("cuda", index)

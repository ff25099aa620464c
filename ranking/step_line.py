"""What one step line says: metric keys, and the line a person reads."""

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from ranking.clock import WindowTiming
from ranking.config import TaskConfig
from ranking.metrics import MetricSums, TaskValues
from ranking.progress import WindowSums

_GIB = 1 << 30
_PAGE_BYTES = 4096


def step_metrics(
    tasks: Sequence[TaskConfig], sums: WindowSums, timing: WindowTiming
) -> dict[str, float]:
    """Metric keys `area/name_unit` and their values; undefined ones are left out."""
    metrics = {
        "train/loss": training_loss(tasks, sums.metrics, sums.num_slots),
        "train/rows_per_s": timing.num_rows / timing.elapsed_s,
        "time/step_s": timing.elapsed_s / timing.steps,
        "time/data_s": timing.data_s,
        "time/data_share": timing.data_s / timing.elapsed_s,
        "time/checkpoint_s": timing.checkpoint_s,
        "time/validation_s": timing.validation_s,
        "time/unix_s": time.time(),
    }
    if sums.penalty:
        metrics["train/penalty"] = sums.mean_penalty
    for task, values in zip(tasks, sums.metrics.values(), strict=True):
        for item in fields(TaskValues):
            value = getattr(values, item.name)
            if value is not None:
                metrics[f"train/{task.name}/{item.name}"] = value
    return metrics


def training_loss(tasks: Sequence[TaskConfig], sums: MetricSums, num_slots: int) -> float:
    """Mean over the window of the tasks' loss (`ranking.losses.TaskLoss`), without penalties."""
    losses = (
        task.weight * (values.logloss or 0.0) * values.weight
        for task, values in zip(tasks, sums.values(), strict=True)
    )
    return sum(losses) / num_slots


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this process: peak HBM on a GPU, resident host memory otherwise."""
    if device.type == "cuda":
        return {"memory/hbm_gib": torch.cuda.max_memory_allocated(device) / _GIB}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory/rss_gib": pages * _PAGE_BYTES / _GIB}


def step_line(
    step: int, num_steps: int, tasks: Sequence[TaskConfig], metrics: dict[str, float]
) -> str:
    """One line with everything."""
    parts = [f"step {step}/{num_steps}", f"loss {metrics['train/loss']:.4f}"]
    for task in tasks:
        names = [name for name in ("ne", "auc") if f"train/{task.name}/{name}" in metrics]
        shown = [f"{name} {metrics[f'train/{task.name}/{name}']:.4f}" for name in names]
        parts += shown if len(tasks) == 1 else [" ".join([task.name, *shown])]
    parts.append(f"{_short(metrics['train/rows_per_s'])} rows/s")
    parts.append(f"data {metrics['time/data_share']:.0%}")
    parts += [
        f"{kind} {metrics[f'memory/{kind}_gib']:.1f} GiB"
        for kind in ("rss", "hbm")
        if f"memory/{kind}_gib" in metrics
    ]
    parts.append(f"eta {_duration((num_steps - step) * metrics['time/step_s'])}")
    return " | ".join(parts)


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

"""`metrics.json` and `oracle.json` of an evaluate artifact: metrics by task."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from ranking.task_metrics import TaskMetrics

METRICS_FILE = "metrics.json"
ORACLE_FILE = "oracle.json"


class TasksMetrics(BaseModel):
    """Metrics by task; version 1."""

    schema_version: Literal[1] = 1
    tasks: dict[str, TaskMetrics] = {}


def write_metrics(tasks: dict[str, TaskMetrics], path: Path) -> None:
    """Write one file."""
    path.write_text(TasksMetrics(tasks=tasks).model_dump_json(indent=2))


def read_metrics(path: Path) -> dict[str, TaskMetrics]:
    """Metrics by task; empty where there is no file (only synthetic data have an oracle)."""
    return TasksMetrics.model_validate_json(path.read_text()).tasks if path.exists() else {}

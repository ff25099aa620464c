"""`braid models`: the published bundles of an output directory, as a table and as JSON."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from embedding.config import StrictConfig
from pipeline.console import figure
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.promotions import Promotions
from pipeline.registry import (
    PublishedModel,
    promotions,
    published,
    require_output,
    require_production,
)

State = Literal["production", "promoted", "withdrawn", "published"]
_STYLE = {"production": "green", "promoted": "", "withdrawn": "red", "published": "dim"}


class Quality(StrictConfig):
    """What a bundle was judged by, of one task: on the days that its run evaluated."""

    num_rows: int
    auc: float | None
    gauc: float | None
    calibration: float | None


class ModelEntry(StrictConfig):
    """One published bundle."""

    date: str
    """Of the run that trained it."""
    learned_up_to: str
    """The last day it was trained on: earlier than `date` with `window.validation_days`, later with
    `publish.catch_up`."""
    artifact_id: str
    published_at: str
    """UTC, ISO 8601."""
    state: State
    """`production`; `promoted`: was there before, and a rollback may return to it; `withdrawn`: was
    withdrawn from production; `published`: was never there."""
    metrics: dict[str, Quality]
    """By task."""
    bundle: str
    """Path of its directory; one that was promoted never changes."""


class ModelList(BaseModel):
    """`braid models list --json`, oldest date first; version 1."""

    schema_version: Literal[1] = 1
    models: tuple[ModelEntry, ...]


class CurrentModel(ModelEntry):
    """`braid models current --json`; version 1."""

    schema_version: Literal[1] = 1


def model_list(out: Path) -> ModelList:
    """The published bundles.

    Raises:
        UserError: `out` is no directory.
    """
    require_output(out)
    past = promotions(out)
    return ModelList(models=tuple(_entry(model, past) for model in published(out)))


def current_model(out: Path) -> CurrentModel:
    """The bundle in production.

    Raises:
        UserError: There is none.
    """
    entry = _entry(require_production(out), promotions(out))
    return CurrentModel(**entry.model_dump())


def models_table(found: ModelList) -> Table:
    """One row a bundle."""
    table = Table(box=SIMPLE)
    for column in ("state", "date", "learned up to", "AUC", "calibration", "published", "bundle"):
        table.add_column(column)
    for entry in found.models:
        style = _STYLE[entry.state]
        table.add_row(
            f"[{style}]{entry.state}[/]" if style else entry.state,
            entry.date,
            entry.learned_up_to,
            _by_task({task: quality.auc for task, quality in entry.metrics.items()}),
            _by_task({task: quality.calibration for task, quality in entry.metrics.items()}),
            datetime.fromisoformat(entry.published_at).isoformat(" ", "seconds"),
            escape(entry.bundle),
        )
    return table


def _by_task(values: Mapping[str, float | None]) -> str:
    if len(values) == 1:
        return figure(*values.values())
    return "  ".join(f"{task} {figure(value)}" for task, value in values.items())


def _entry(model: PublishedModel, past: Promotions) -> ModelEntry:
    identity = model.manifest.artifact_id
    return ModelEntry(
        date=model.date,
        learned_up_to=model.manifest.facts.learned_up_to,
        artifact_id=identity,
        published_at=model.manifest.created_at,
        state=_state(identity, past),
        metrics={
            task: Quality.model_validate(metrics, from_attributes=True)
            for task, metrics in read_metrics(model.directory / METRICS_FILE).items()
        },
        bundle=str(model.bundle),
    )


def _state(identity: str, past: Promotions) -> State:
    in_force = [change.artifact_id for change in past.in_force]
    if in_force and in_force[-1] == identity:
        return "production"
    if any(change.artifact_id == identity for change in past.withdrawn):
        return "withdrawn"
    return "promoted" if identity in in_force else "published"

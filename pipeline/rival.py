"""The model that a new one would replace, on the rows that the new one is evaluated on.

Its published metrics are of the days after its own date, and a harder day looks like a worse model.
So the gate predicts the new one's rows with its checkpoint, where that is still there and reads the
same samples; else it compares with what was published, and says why.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding.errors import CheckpointError, UserError
from pipeline.artifacts import read_manifest
from pipeline.config import Recipe
from pipeline.content.paths import ContentPaths
from pipeline.evaluate import PREDICTIONS, evaluate
from pipeline.failures import user_error
from pipeline.identity import content_config, plan_config, samples_config
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.plan import PlanFacts
from pipeline.recipe import read_recipe
from pipeline.registry import PublishedModel
from pipeline.stages import CATCH_UP
from pipeline.train import TrainedModel
from pipeline.train_facts import CatchUpFacts, TrainFacts, read_training
from ranking.task_metrics import TaskMetrics

PRODUCTION = "production"
"""Folder of a gate artifact: the metrics of the model that would be replaced."""


@dataclass(frozen=True)
class Rival:
    """The figures that a new model must not fall behind."""

    date: str
    metrics: dict[str, TaskMetrics]
    rows: str
    """Which rows they are of, in words."""


@dataclass(frozen=True)
class EvaluatedRows:
    """What the new model was evaluated on."""

    run: Path
    """OUT/DATE."""
    days: tuple[str, ...]
    samples: Callable[[], list[Path]]
    content: ContentPaths | None
    """Tokens of all items that the rows show, where its recipe has content."""


def rival_of(
    recipe: Recipe,
    current: PublishedModel,
    new: EvaluatedRows,
    scratch: Path,
    wait: Callable[[], None],
) -> Rival | None:
    """The figures of the model that would be replaced; None where no rule compares.

    Args:
        recipe: of the new model.
        current: what would be replaced.
        new: rows of the new model.
        scratch: of the gate; predictions are not kept there.
        wait: called before the cluster is used.

    Raises:
        UserError: its rows cannot be predicted now, but for no fault of its checkpoint.
    """
    if not any(rules.compares for _, rules in recipe.gate.by_path):
        return None
    if _is_same_model(current, new):
        metrics = read_metrics(new.run / "evaluate" / METRICS_FILE)
        return Rival(current.date, metrics, "on the same rows: it is this very model")
    stage = current.manifest.facts.training
    rows, training = "on the same rows", new.run.parent / current.date / stage
    if training.name == CATCH_UP and _has_learned(training, new.days):
        rows, training = "on the same rows, before it caught up", training.with_name("train")
    obstacle = _obstacle(recipe, current, training, new)
    if obstacle is not None:
        return _as_published(current, obstacle)
    wait()
    same = {"cluster": recipe.cluster, "evaluation": recipe.evaluation}
    model = TrainedModel.of(read_recipe(training).model_copy(update=same), training, new.content)
    folder = scratch / PRODUCTION
    folder.mkdir()
    try:
        evaluate(model, samples=new.samples(), counts=new.run / "ingest", scratch=folder)
    except Exception as error:
        fault = user_error(error)
        # A damaged checkpoint holds no new model back. What another attempt may find gone, a busy
        # cluster or a full disk, must not decide that other days are compared.
        if not isinstance(fault, CheckpointError):
            raise
        shutil.rmtree(folder)
        return _as_published(current, str(fault))
    shutil.rmtree(folder / PREDICTIONS)
    return Rival(current.date, read_metrics(folder / METRICS_FILE), rows)


def _as_published(current: PublishedModel, obstacle: str) -> Rival:
    rows = f"on the days after its own date, since {obstacle}"
    return Rival(current.date, read_metrics(current.directory / METRICS_FILE), rows)


def _is_same_model(current: PublishedModel, new: EvaluatedRows) -> bool:
    """Whether the new training has taken over what the one in production learned last."""
    trained = read_manifest(new.run / "train", TrainFacts)
    assert trained is not None
    return current.manifest.facts.training == CATCH_UP and (
        trained.facts.caught_up == current.manifest.inputs.get(CATCH_UP)
    )


def _has_learned(training: Path, days: tuple[str, ...]) -> bool:
    trained = read_manifest(training, CatchUpFacts)
    return trained is not None and not {*trained.facts.days}.isdisjoint(days)


def _obstacle(
    recipe: Recipe, current: PublishedModel, training: Path, new: EvaluatedRows
) -> str | None:
    """Why its checkpoint cannot predict the rows of the new model; None: it can."""
    trained, planned = read_training(training), read_manifest(training.parent / "plan", PlanFacts)
    if (
        trained is None
        or planned is None
        or current.manifest.inputs.get(training.name) != trained.artifact_id
        or trained.inputs.get("plan") != planned.artifact_id
    ):
        return f"the run that trained it is no longer in {training.parent}"
    try:
        other = read_recipe(training)
    except UserError as error:
        return str(error)
    if _tokens(other) != _tokens(recipe):
        return "what it reads of items' texts and images is another"
    theirs, ours = samples_config(other), samples_config(recipe)
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if differing:
        return f"its samples are others ({', '.join(differing)})"
    trained_now = read_manifest(new.run / "train", TrainFacts)
    planned_now = read_manifest(new.run / "plan", PlanFacts)
    assert trained_now is not None
    assert planned_now is not None
    if trained.facts.codebooks != trained_now.facts.codebooks:
        return "its codes are of other codebooks"
    if plan_config(other)["cluster"] != plan_config(recipe)["cluster"] or (
        not planned.facts.cluster.is_like(planned_now.facts.cluster)
    ):
        return "its tables are placed on another cluster"
    return None


def _tokens(recipe: Recipe) -> dict[str, Any] | None:
    return None if recipe.content is None else content_config(recipe.content)

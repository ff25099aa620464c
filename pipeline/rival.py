"""The model that a new one would replace, on the rows that the new one is evaluated on.

Its published metrics are of the days after its own date, and a harder day looks like a worse model.
So the gate predicts the new one's rows with its checkpoint, where that is still there and reads the
same samples; else it compares with what was published, and says why.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embedding.errors import UserError
from pipeline.artifacts import Manifest, read_manifest
from pipeline.config import Recipe
from pipeline.evaluate import PREDICTIONS, evaluate
from pipeline.failures import user_error
from pipeline.identity import plan_config, samples_config
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.recipe import read_recipe
from pipeline.registry import PublishedModel
from pipeline.train import TrainedModel
from ranking.evaluation import TaskMetrics

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

    train: Path
    """Its train artifact."""
    samples: Callable[[], list[Path]]
    counts: Path
    """The ingest artifact of its date."""


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
    """
    if all(rules.max_auc_drop is None for rules in recipe.gate.tasks):
        return None
    train = new.train.parents[1] / current.date / "train"
    obstacle = _obstacle(recipe, current, train, new)
    if obstacle is not None:
        return _as_published(current, obstacle)
    wait()
    same = {"cluster": recipe.cluster, "evaluation": recipe.evaluation}
    model = TrainedModel.of(read_recipe(train).model_copy(update=same), train, None)
    folder = scratch / PRODUCTION
    folder.mkdir()
    try:
        evaluate(model, samples=new.samples(), counts=new.counts, scratch=folder)
    except Exception as error:
        fault = user_error(error)
        if fault is None:
            raise
        shutil.rmtree(folder)
        return _as_published(current, str(fault))  # a damaged checkpoint holds no new model back
    shutil.rmtree(folder / PREDICTIONS)
    return Rival(current.date, read_metrics(folder / METRICS_FILE), "on the same rows")


def _as_published(current: PublishedModel, obstacle: str) -> Rival:
    rows = f"on the days after its own date, since {obstacle}"
    return Rival(current.date, read_metrics(current.directory / METRICS_FILE), rows)


def _obstacle(
    recipe: Recipe, current: PublishedModel, train: Path, new: EvaluatedRows
) -> str | None:
    """Why its checkpoint cannot predict the rows of the new model; None: it can."""
    trained, planned = read_manifest(train), read_manifest(train.parent / "plan")
    if (
        trained is None
        or planned is None
        or _inputs(current.manifest, trained)
        != (
            trained.artifact_id,
            planned.artifact_id,
        )
    ):
        return f"the run that trained it is no longer in {train.parent}"
    try:
        other = read_recipe(train)
    except UserError as error:
        return str(error)
    if recipe.content is not None or other.content is not None:
        return "models that read content are not compared on the same rows"
    theirs, ours = samples_config(other), samples_config(recipe)
    differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if differing:
        return f"its samples are others ({', '.join(differing)})"
    trained_now = read_manifest(new.train)
    assert trained_now is not None
    if trained.facts.get("codebooks") != trained_now.facts.get("codebooks"):
        return "its codes are of other codebooks"
    if plan_config(other)["cluster"] != plan_config(recipe)["cluster"]:
        return "its tables are placed on another cluster"
    return None


def _inputs(published: Manifest, trained: Manifest) -> tuple[str | None, str | None]:
    return published.inputs.get("train"), trained.inputs.get("plan")

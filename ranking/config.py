"""Configuration of the dense side: model, tasks, losses, training loop.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from typing import Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embedding.config import StrictConfig
from embedding.errors import not_among
from embedding.names import Name
from ranking.classifier_config import Classifier, Dnn, Dropout
from ranking.experts_config import ExpertsConfig
from ranking.fgcnn_config import Fgcnn
from ranking.interest_config import InterestConfig
from ranking.trainer_config import TrainerConfig


class TaskConfig(StrictConfig):
    """One predicted event."""

    name: Name
    label: str | None = None
    """0/1 column of the events; null where the task is not observed. Default: the task's name."""
    weight: PositiveFloat = 1.0
    """Weight of the task's loss."""
    sample_weight: str | None = None
    """Column of the events with the weight of each row in the task's loss and metrics, 0 or more; a
    null counts as 1. With 1 / rate on rows that were kept at a rate, as sampled negatives are,
    predictions are those of all rows. Default: that of the task `after` which this one comes, and
    without one every row counts the same."""
    after: str | None = None
    """A task that must come first: a purchase is possible `after: click`. The model then learns
    p(task | after), and everything shown, trained and published is p(task) = p(after) p(task |
    after), over all rows. A null label counts as 0 where the label of `after` is 0, and as not
    observed elsewhere."""

    @property
    def label_name(self) -> str:
        """Column of the events that holds the label."""
        return self.label or self.name

    @property
    def oracle_name(self) -> str:
        """Column of the events with the true probability, where there is one (synthetic data)."""
        return f"oracle_{self.name}"


class ModelConfig(StrictConfig):
    """The ranking model: embeddings -> interest -> generator -> classifier -> one tower a task."""

    interests: tuple[InterestConfig, ...] = ()
    field_dim: PositiveInt | None = Field(default=None, multiple_of=4)
    """Fields of another dim are projected to this one; None: fields keep their dims."""
    field_dropout: dict[str, Dropout] = {}
    """Share of the training samples that lose a sparse feature, by its name: ids that are new when
    the model is used look like ids that were left out, and content or codes have to do. A hashed
    table needs many more rows than ids for that: else a new id reads the row of another one."""
    generator: Fgcnn | None = None
    """Adds new features to the fields, whatever the classifier."""
    classifier: Classifier = Dnn()
    compile: bool = False
    """Fuse the steps behind lookup and histories with `torch.compile`; on CPU it needs g++."""
    experts: ExpertsConfig | None = None
    """None: one linear head a task on the classifier's output."""


class RankingConfig(StrictConfig):
    """Tasks, model and training loop."""

    tasks: tuple[TaskConfig, ...]
    model: ModelConfig = ModelConfig()
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks must be named, unique and at least one; got {names}")
        for task in self.tasks:
            _check_ancestors(task, {other.name: other for other in self.tasks})
        chosen = self.trainer.validation.task
        if chosen is not None and chosen not in names:
            raise ValueError(
                "trainer.validation.task: "
                f"{not_among(chosen, 'tasks', names, 'use one of them, or null for their mean')}"
            )
        return self

    @property
    def sample_weights(self) -> dict[str, str]:
        """Column with the weights of a task's rows, by task; those without one are left out."""
        by_name = {task.name: task for task in self.tasks}
        found = {}
        for task in self.tasks:
            first: TaskConfig | None = task
            while first is not None and first.sample_weight is None:
                first = by_name.get(first.after or "")
            if first is not None and first.sample_weight is not None:
                found[task.name] = first.sample_weight
        return found


def _check_ancestors(task: TaskConfig, tasks: dict[str, TaskConfig]) -> None:
    path = [task.name]
    while (parent := tasks[path[-1]].after) is not None:
        if parent not in tasks:
            raise ValueError(
                f"task {path[-1]!r}: after={not_among(parent, 'tasks', sorted(tasks))}"
            )
        path.append(parent)
        if parent in path[:-1]:
            raise ValueError(
                f"task {task.name!r}: after leads in a circle ({' after '.join(path)}); leave "
                "`after` out of the task that comes first"
            )

"""Configuration of the dense side: model, tasks, losses, training loop.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embedding.config import StrictConfig
from ranking.classifier_config import Classifier, Dnn
from ranking.fgcnn_config import Fgcnn


class TaskConfig(StrictConfig):
    """One predicted event."""

    name: str
    label: str | None = None
    """0/1 column of the events; null where the task is not observed. Default: the task's name."""
    weight: PositiveFloat = 1.0
    """Weight of the task's loss."""

    @property
    def label_name(self) -> str:
        """Column of the events that holds the label."""
        return self.label or self.name


class InterestConfig(StrictConfig):
    """DIN target attention of the candidate over one history."""

    history: str
    hidden: tuple[PositiveInt, ...] = (64, 32)
    """Widths of the attention MLP."""
    softmax: bool = False
    """Normalise the attention weights; the paper does not."""


class MixtureOfExpertsConfig(StrictConfig):
    """MMoE: experts shared by the tasks, one gate and one tower a task."""

    num_experts: PositiveInt = 4
    expert_hidden: tuple[PositiveInt, ...] = (64,)
    tower_hidden: tuple[PositiveInt, ...] = (32,)


class ModelConfig(StrictConfig):
    """The ranking model: embeddings -> interest -> generator -> classifier -> one tower a task."""

    interests: tuple[InterestConfig, ...] = ()
    field_dim: PositiveInt | None = Field(default=None, multiple_of=4)
    """Fields of another dim are projected to this one; None: fields keep their dims."""
    generator: Fgcnn | None = None
    """Adds new features to the fields, whatever the classifier."""
    classifier: Classifier = Dnn()
    compile: bool = False
    """Fuse the steps behind lookup and histories with `torch.compile`; on CPU it needs g++."""
    experts: MixtureOfExpertsConfig | None = None
    """None: one linear head a task on the classifier's output."""


class DenseAdam(StrictConfig):
    """Adam (decoupled weight decay) for everything that is not a table."""

    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0


class TrainerConfig(StrictConfig):
    """The training loop."""

    epochs: PositiveInt = 1
    batch_size_per_rank: PositiveInt = 1024
    dense_optimizer: DenseAdam = DenseAdam()
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast; tables and optimizer states stay fp32."""
    max_grad_norm: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    log_every_steps: PositiveInt = 50
    """Steps between two metric lines; the metrics cover the steps in between."""
    checkpoint_every_steps: PositiveInt | None = 500
    """None: one checkpoint, at the end."""
    keep_checkpoints: PositiveInt = 2


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
        return self

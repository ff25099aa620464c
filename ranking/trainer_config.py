"""Configuration of the training loop; imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from embedding.config import StrictConfig


class DenseAdam(StrictConfig):
    """Adam (decoupled weight decay) for everything that is not a table."""

    learning_rate: PositiveFloat = 1e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class Constant(StrictConfig):
    """No decay."""

    kind: Literal["constant"] = "constant"


class LinearDecay(StrictConfig):
    """Falls in a straight line from 1 to `final_factor`."""

    kind: Literal["linear"] = "linear"
    num_steps: PositiveInt | None = None
    """Steps of the decay after the warm-up; None: to the end of the last epoch."""
    final_factor: float = Field(default=0.0, ge=0, le=1)


class CosineDecay(StrictConfig):
    """Along half a cosine from 1 to `final_factor`."""

    kind: Literal["cosine"] = "cosine"
    num_steps: PositiveInt | None = None
    """Steps of the decay after the warm-up; None: to the end of the last epoch."""
    final_factor: float = Field(default=0.0, ge=0, le=1)


class InverseSqrtDecay(StrictConfig):
    """1 / sqrt(1 + steps since the warm-up / timescale_steps): needs no end."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale_steps: PositiveInt = 1000


Decay = Annotated[
    Constant | LinearDecay | CosineDecay | InverseSqrtDecay, Field(discriminator="kind")
]


class Plateau(StrictConfig):
    """Lower the learning rates when validation stops improving."""

    factor: float = Field(default=0.5, gt=0, lt=1)
    patience: PositiveInt = 1
    """Validations without improvement, since the best one or the last cut, before a cut."""


class ScheduleConfig(StrictConfig):
    """One factor on all learning rates: dense, fused sparse, data-parallel tables.

    Each keeps its own base rate, so their ratios do not change.
    """

    warmup_steps: NonNegativeInt = 0
    """The factor rises in a straight line to 1 over these steps."""
    decay: Decay = Constant()
    plateau: Plateau | None = None
    """Multiplies the decay; needs `window.validation_days`."""


class ValidationConfig(StrictConfig):
    """How often the held-out days are predicted, and what follows from it."""

    every_steps: PositiveInt | None = None
    """None: at the end of every epoch."""
    metric: Literal["auc", "logloss"] = "auc"
    task: str | None = None
    """Task whose metric counts; None: the mean over tasks."""
    min_improvement: NonNegativeFloat = 0.0
    """A validation is better when it beats the best one by more than this."""
    patience: PositiveInt | None = None
    """Validations without improvement before training stops; None: it never stops early."""


class TrainerConfig(StrictConfig):
    """The training loop."""

    epochs: PositiveInt = 1
    """Times that every row of the window is trained on."""
    batch_size_per_rank: PositiveInt = 1024
    """Rows of a step on one rank; a step has this times `cluster.num_workers`."""
    dense_optimizer: DenseAdam = DenseAdam()
    """Of everything but the tables (`embedding.optimizer`) and the content encoder."""
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products under autocast; tables and optimizer states stay fp32."""
    max_grad_norm: PositiveFloat | None = None
    """Bound of the norm of all dense gradients; tables have no gradient to clip."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average the dense weights over steps, and validate, evaluate and publish the average."""
    validation: ValidationConfig = ValidationConfig()
    """What is validated and when, with `window.validation_days`: the best checkpoint is then the
    result."""
    seed: NonNegativeInt = 0
    """Draws initial values, the order of rows, and dropout."""
    log_every_steps: PositiveInt = 50
    """Steps between two metric lines; the metrics cover the steps in between."""
    checkpoint_every_steps: PositiveInt | None = 500
    """None: one checkpoint at the end, and one at every best validation."""
    keep_checkpoints: PositiveInt = 2
    """Latest checkpoints kept; the best one is kept besides."""

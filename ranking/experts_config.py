"""Configuration of what lies between the classifier and the tasks; imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from embedding.config import StrictConfig


class SharedBottom(StrictConfig):
    """One tower a task on the classifier's output: few parameters, for tasks that agree."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    tower_hidden: tuple[PositiveInt, ...] = (32,)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class MixtureOfExpertsConfig(StrictConfig):
    """MMoE: experts shared by the tasks, one gate and one tower a task."""

    kind: Literal["mmoe"] = "mmoe"
    num_experts: PositiveInt = 4
    expert_hidden: tuple[PositiveInt, ...] = Field(default=(64,), min_length=1)
    tower_hidden: tuple[PositiveInt, ...] = (32,)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class ProgressiveExtractionConfig(StrictConfig):
    """PLE: layers of shared experts and of experts of one task; for tasks that conflict."""

    kind: Literal["ple"] = "ple"
    num_layers: PositiveInt = 2
    num_shared_experts: PositiveInt = 2
    num_task_experts: PositiveInt = 2
    """Experts of each task in each layer."""
    expert_hidden: tuple[PositiveInt, ...] = Field(default=(64,), min_length=1)
    """Widths of an expert in every layer."""
    tower_hidden: tuple[PositiveInt, ...] = (32,)
    dropout: float = Field(default=0.0, ge=0, lt=1)


ExpertsConfig = Annotated[
    SharedBottom | MixtureOfExpertsConfig | ProgressiveExtractionConfig,
    Field(discriminator="kind"),
]

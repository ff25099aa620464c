"""The section `gate` of a recipe: what a model must show before it is published."""

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from embedding.config import StrictConfig
from embedding.errors import not_among


class TaskGate(StrictConfig):
    """What a model must show of one task, on the rows that the run evaluates."""

    task: str
    """The task that these rules judge."""
    min_rows: PositiveInt = 1000
    """The fewest rows whose label is observed: fewer say too little of a model."""
    min_rows_per_class: PositiveInt = 100
    """The fewest rows with label 1, and with label 0."""
    min_auc: float = Field(default=0.5, ge=0, le=1)
    """The least AUC."""
    max_auc_drop: PositiveFloat | None = None
    """Against the model in production, whose AUC is that of the same rows as long as its run is
    there and reads the same features, else that of the days after its own date; None: not
    compared."""
    min_gauc: float | None = Field(default=None, ge=0, le=1)
    """The least GAUC (`evaluation.group_by`); None: any."""
    max_gauc_drop: PositiveFloat | None = None
    """As max_auc_drop, of GAUC."""
    calibration: tuple[float, float] = (0.5, 2.0)
    """Allowed range of sum of predictions / sum of labels."""

    @property
    def compares(self) -> bool:
        """Whether a rule looks at the model in production."""
        return self.max_auc_drop is not None or self.max_gauc_drop is not None

    @property
    def needs_gauc(self) -> bool:
        """Whether a rule is of GAUC, which is not defined where no group has both classes."""
        return self.min_gauc is not None or self.max_gauc_drop is not None

    @field_validator("calibration")
    @classmethod
    def _check_calibration(cls, allowed: tuple[float, float]) -> tuple[float, float]:
        low, high = allowed
        if not 0 <= low < high:
            raise ValueError(
                f"[{low:g}, {high:g}] allows no model; write it as [low, high] with "
                "0 <= low < high, for example [0.8, 1.25]"
            )
        return allowed


class GateConfig(TaskGate):
    """What a model must show before it is published.

    `task` is the one that counts, which reports show first.
    """

    also: tuple[TaskGate, ...] = ()
    """Rules of further tasks; a model passes where it breaks none of any task."""

    @property
    def by_path(self) -> tuple[tuple[str, TaskGate], ...]:
        """The rules of every task that has some, and where in the recipe they are."""
        return (("gate", self), *((f"gate.also.{i}", rules) for i, rules in enumerate(self.also)))

    def check_tasks(self, tasks: list[str]) -> None:
        """Refuse rules of tasks that are not there, or have rules already.

        Raises:
            ValueError: names the path.
        """
        seen: list[str] = []
        for path, rules in self.by_path:
            if rules.task not in tasks:
                raise ValueError(
                    f"{path}.task: {not_among(rules.task, 'tasks', tasks, 'use one of them')}"
                )
            if rules.task in seen:
                raise ValueError(
                    f"{path}.task: {rules.task!r} has rules already; write them in one place"
                )
            seen.append(rules.task)

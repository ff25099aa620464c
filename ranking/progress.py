"""How far training is: what must be saved beside the weights so that a resume changes nothing."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from embedding.epochs import Position
from ranking.clock import Totals
from ranking.metrics import MetricSums, all_reduce_sums
from ranking.validation import ValidationState

# Shapes: T tasks, X sums kept per task.


@dataclass(frozen=True)
class Progress:
    """Equal on all ranks, but for `totals`: each has a clock.

    No random state: every step seeds its own (see `Trainer`).
    """

    step: int = 0
    """Steps done since the start of the run, over all epochs."""
    position: Position = field(default_factory=Position)
    window_TX: Tensor | None = None
    """Metric sums since the last step line, over all ranks; None before the first step."""
    window_slots: int = 0
    """Rows since the last step line over all ranks, filling ones included."""
    window_penalty: float = 0.0
    """Sum over these rows of the penalty of their batch."""
    validation: ValidationState = ValidationState()
    totals: Totals = Totals()

    def state_dict(self, rank: int = 0) -> dict[str, Any]:
        """JSON types, for a checkpoint; floats survive to the last digit.

        What is equal on all ranks rank 0 alone holds: a window has thousands of numbers a task, and
        every rank gathers what all of them say.
        """
        own = {"totals": asdict(self.totals)}
        if rank != 0:
            return own
        return {
            "step": self.step,
            "position": self.position.model_dump_json(),
            "window": None if self.window_TX is None else self.window_TX.tolist(),
            "window_slots": self.window_slots,
            "window_penalty": self.window_penalty,
            "validation": self.validation.model_dump_json(),
            **own,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Progress":
        """What `state_dict` of rank 0 described, `totals` of any rank."""
        window = state["window"]
        return cls(
            step=state["step"],
            position=Position.model_validate_json(state["position"]),
            window_TX=None if window is None else torch.tensor(window, dtype=torch.float64),
            window_slots=state["window_slots"],
            window_penalty=state["window_penalty"],
            validation=ValidationState.model_validate_json(state["validation"]),
            totals=Totals(**state.get("totals", {})),  # nor these
        )


@dataclass(frozen=True)
class WindowSums:
    """Sums over all ranks since the last step line."""

    metrics: MetricSums
    num_slots: int
    """Rows, filling ones included."""
    penalty: float
    """Over these rows, of the penalty of their batch."""

    @property
    def mean_penalty(self) -> float:
        """Of a step; 0 before the first one."""
        return self.penalty / max(self.num_slots, 1)


class Window:
    """Metric sums of the steps since the last step line.

    Rank-local sums are folded into the global ones at every checkpoint, in a disturbed and in an
    undisturbed run alike: so both add the same numbers in the same order.
    """

    def __init__(self, progress: Progress, num_tasks: int, device: torch.device) -> None:
        self._global = MetricSums.zeros(num_tasks, device)
        if progress.window_TX is not None:
            self._global = MetricSums(progress.window_TX.to(device))
        self._slots, self._penalty = progress.window_slots, progress.window_penalty
        self._clear_local()

    def update(
        self, logits_BT: Tensor, labels_BT: Tensor, weights_BT: Tensor, penalty: Tensor
    ) -> None:
        """Add a batch of this rank. Waits for no device."""
        self._local.update(logits_BT, labels_BT, weights_BT)
        self._local_slots += len(logits_BT)
        self._local_penalty += penalty.double() * len(logits_BT)

    def fold(self, rank_values: Tensor) -> tuple[WindowSums, Tensor]:
        """Make the sums global.

        Args:
            rank_values: float64 values of this rank that are summed in the same message.

        Returns:
            The window's sums and the summed `rank_values`.
        """
        slots = self._local_penalty.new_tensor(float(self._local_slots))
        sums_TX, counts_2, rank_values = all_reduce_sums(
            [
                self._local.sums_TX,
                torch.stack([slots, self._local_penalty]),
                rank_values.to(slots.device),
            ]
        )
        slots_and_penalty: list[float] = counts_2.tolist()
        self._global = self._global + MetricSums(sums_TX)
        self._slots += int(slots_and_penalty[0])
        self._penalty += slots_and_penalty[1]
        self._clear_local()
        return WindowSums(self._global, self._slots, self._penalty), rank_values

    def clear(self) -> None:
        """Start the next window."""
        self._global = MetricSums(torch.zeros_like(self._global.sums_TX))
        self._slots, self._penalty = 0, 0.0

    def _clear_local(self) -> None:
        self._local = MetricSums(torch.zeros_like(self._global.sums_TX))
        self._local_slots = 0
        self._local_penalty = self._local.sums_TX.new_zeros(())

"""What a gate decided; imports nothing heavy."""

from typing import Literal

from embedding.config import StrictConfig
from pipeline.artifacts import StageFacts


class RuleCheck(StrictConfig):
    """One rule of the gate, against what was found."""

    task: str
    rule: str
    """Its path in the recipe."""
    asked: str
    found: str
    reason: str | None = None
    """Why it is broken, a sentence; None: it is kept."""


class GateDecision(StageFacts):
    """Whether a model may be published, and why not; version 1."""

    schema_version: Literal[1] = 1
    passed: bool
    reasons: tuple[str, ...]
    """One sentence per broken rule; empty when it passed."""
    checks: tuple[RuleCheck, ...]
    """Every rule that was looked at; where rows are too few for a task, that one alone of it."""
    compared_with: str | None
    """Date of the bundle it was compared with; None: there is none, or no rule compares."""
    compared: str | None = None
    """On which rows, in words; None where no rule compares."""

"""What a gate decided; imports nothing heavy."""

from typing import Literal

from pipeline.artifacts import StageFacts


class GateDecision(StageFacts):
    """Whether a model may be published, and why not; version 1."""

    schema_version: Literal[1] = 1
    passed: bool
    reasons: tuple[str, ...]
    """One sentence per broken rule; empty when it passed."""
    compared_with: str | None
    """Date of the bundle it was compared with; None: there is none, or no rule compares."""
    compared: str | None = None
    """On which rows, in words; None where no rule compares."""

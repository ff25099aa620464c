"""What the pipeline asks of whoever publishes its models."""

from pathlib import Path
from typing import Protocol

from pipeline.config import Recipe
from pipeline.stages import StageOutput


class Publish(Protocol):
    """Writes a servable bundle of a finished training into a directory."""

    def __call__(self, recipe: Recipe, train: Path, scratch: Path) -> StageOutput:
        """Write the bundle into `scratch`."""
        ...

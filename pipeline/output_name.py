"""Whose runs an output directory holds: DIR/recipe_name.json, written by the first run.

Runs start from each other's models and replace what is in production, so runs of two models must
not share a directory.
"""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import write_durably

NAME_FILE = "recipe_name.json"


class RecipeName(StrictConfig):
    """The recipe that an output directory belongs to; version 1."""

    schema_version: Literal[1] = 1
    recipe: str
    """Its `name`."""


def claim(out: Path, recipe: str) -> None:
    """Write down that the runs in an existing directory are those of a recipe's name.

    Raises:
        UserError: They are those of another one.
    """
    known = _known_name(out)
    if known is not None and known != recipe:
        raise UserError(
            f"--out {out} holds runs of the recipe {known!r}, and this one's name is {recipe!r}: "
            f"it would start from their models and replace what is in production there; choose "
            f"another --out, or say that it is the same model: --set name={known}"
        )
    if not (out / NAME_FILE).exists():
        write_durably(out / NAME_FILE, RecipeName(recipe=recipe).model_dump_json(indent=2))


def _known_name(out: Path) -> str | None:
    """Name of the recipe whose runs are there."""
    path = out / NAME_FILE
    if path.exists():
        try:
            return RecipeName.model_validate_json(path.read_text()).recipe
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged or of another version of Braid; remove it, and the next run "
                "writes it anew"
            ) from error
    return None

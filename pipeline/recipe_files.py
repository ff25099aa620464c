"""Files that a recipe names, checked before a run starts anything. Imports nothing heavy."""

from pathlib import Path

from embedding.errors import UserError
from multimodal.content_config import TINY
from multimodal.tower_files import require_files
from pipeline.config import Recipe
from pipeline.planning.request import check_plan_files


def check_recipe_files(recipe: Recipe) -> None:
    """Refuse files that a stage would, before any stage runs: of plans and of towers.

    Raises:
        UserError: A file is missing, or something else, or of other tables or ranks, or a tower's
            files may change.
    """
    check_plan_files(recipe)
    for path, content in recipe.contents.items():
        for name, tower in content.towers.items():
            try:
                require_files(tower)
            except UserError as error:
                raise UserError(f"{path}.{name}: {error}") from error


def tower_folders(recipe: Recipe) -> dict[str, Path]:
    """Directories of towers, by the setting that gives them: workers must find them there, too."""
    return {
        f"{path}.{name}.model": Path(tower.model)
        for path, content in recipe.contents.items()
        for name, tower in content.towers.items()
        if tower.model != TINY and Path(tower.model).is_dir()
    }

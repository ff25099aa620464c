"""`braid export`: the bundle of a trained day in a folder of the user's, whatever the gate says.

Reads DIR/<date>/train, or catch_up where that is what was or would be published, and writes with
the code of the publish stage; production stays as it is, and runs go on meanwhile.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from deploy.publish import publish
from embedding.config import TablePrecision
from embedding.errors import UserError
from pipeline.artifacts import read_manifest, reading
from pipeline.catch_up import training_to_publish
from pipeline.config import Recipe
from pipeline.lineage import gate_of
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import BUNDLE, PublishFacts


@dataclass(frozen=True)
class Exported:
    """A bundle that was written."""

    num_rows: int
    """Of all tables."""
    tables: TablePrecision
    num_bytes: int
    refused: tuple[str, ...]
    """Why the gate refused the model; empty where it passed, or has not looked at it."""
    is_judged: bool
    """Whether the gate has decided on the model of the date as it was trained last."""


def export_bundle(
    out: Path, date: str, folder: Path, tables: TablePrecision | None = None
) -> Exported:
    """Write the bundle of the model that was trained up to a date.

    Args:
        out: output directory of the run.
        date: of the run, YYYY-MM-DD.
        folder: a missing or an empty directory. It holds the whole bundle or nothing.
        tables: how the bundle holds tables; None: as the run of the date publishes them.

    Raises:
        UserError: nothing was trained, the folder holds something, or a run trains that date anew.
    """
    train = _trained(out, date)
    _check_free(folder)
    partial = _scratch(folder)
    try:
        with reading(train):
            recipe = _with_tables(read_recipe(train), tables or _published_as(out / date, train))
            written = publish(recipe, train, partial)
        _check_free(folder)
        (partial / BUNDLE).rename(folder)  # an empty directory gives way
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    assert isinstance(written.facts, PublishFacts)
    gate = gate_of(out, date)
    return Exported(
        written.rows_out,
        recipe.publish.tables,
        written.facts.num_bytes,
        refused=() if gate is None else gate.facts.reasons,
        is_judged=gate is not None,
    )


def _published_as(run: Path, train: Path) -> TablePrecision:
    """How the run of a date holds tables: its training may be older, and need not say the same."""
    has_own = (run / RECIPE_FILE).exists()
    return read_recipe(run if has_own else train).publish.tables


def _with_tables(recipe: Recipe, tables: TablePrecision) -> Recipe:
    settings = recipe.publish.model_copy(update={"tables": tables})
    return recipe.model_copy(update={"publish": settings})


def _trained(out: Path, date: str) -> Path:
    """The training of a date whose model its run publishes."""
    train = out / date / "train"
    trained = read_manifest(train)
    if trained is None:
        known = sorted(path.parts[-3] for path in out.glob("????-??-??/train/manifest.json"))
        raise UserError(
            f"--date {date}: {out} holds no trained model of that date (trained are: "
            f"{', '.join(known) or 'none'}); run `braid run --date {date} --out {out} ...` first"
        )
    published = read_manifest(train.parent / "publish", PublishFacts)
    if published is not None and published.inputs["train"] == trained.artifact_id:
        return train.parent / published.facts.training
    return training_to_publish(train.parent)


def _scratch(folder: Path) -> Path:
    """An empty directory beside a folder."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be written: {error}; name another folder") from error
    return partial


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder} is a file; name a folder that is not there or is empty")
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise UserError(
            f"--to {folder} is not empty, and export overwrites nothing; name another folder, or "
            "remove this one first"
        )

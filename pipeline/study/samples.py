"""Samples of a study: which variants share a directory of them, and that they stay the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedding.errors import UserError
from embedding.files import link_tree
from pipeline.artifacts import config_hash, damaged_files, read_manifest
from pipeline.codes.align_stage import alignment_settings
from pipeline.config import Recipe
from pipeline.identity import content_config, ingest_config, samples_config
from pipeline.stages import StageSpec

_SHARED = ("ingest", "content", "align", "join")
"""Stages that write into their own directory only."""


def samples_key(recipe: Recipe, date: str) -> str:
    """Names the data of a variant: equal only where all artifacts from ingest to join are equal.

    With codes each date has its own: they go on with encoder and codebooks of the runs before, and
    a study's figures must not depend on which dates were studied before.
    """
    codes: dict[str, Any] = {}
    if recipe.codes is not None:
        codes = {**recipe.codes.quantized, "force_on": [*map(str, recipe.codes.refit.force_on)]}
        codes["date"] = date
        if recipe.codes.has_alignment:
            codes["alignment"] = alignment_settings(recipe)
        if recipe.codes.taken_from is not None:
            codes["taken_from"] = str(recipe.codes.taken_from)
    held_out = recipe.evaluation.held_out_items
    return config_hash(
        {
            "root": str(recipe.data.root),
            "window": recipe.window.model_dump(mode="json", exclude={"warm_start"}),
            "ingest": ingest_config(recipe),
            "samples": samples_config(recipe),
            "held_out": None if held_out is None else held_out.model_dump(mode="json"),
            "content": None if recipe.content is None else content_config(recipe.content),
            "codes": codes,
        }
    )


def take_over(spec: StageSpec, data: Path) -> None:
    """Link what a stage would make from another variant's data, if it lies there.

    Variants that differ in codes share days and alignments, which are equal but not cheap.

    Args:
        spec: of the stage; nothing happens where it has an artifact, current or not.
        data: directory of the data of all variants.
    """
    if spec.name not in _SHARED or spec.directory.exists():
        return
    for other in sorted(data.glob(f"*/{spec.directory.parent.name}/{spec.name}")):
        manifest = read_manifest(other)
        if manifest is None or manifest.artifact_id != spec.artifact_id:
            continue
        if not damaged_files(other, thorough=False):
            link_tree(other, spec.directory)
            return


def identities(sources: Mapping[str, Path]) -> dict[str, str]:
    """Artifact ids of directories."""
    found = {}
    for name, directory in sources.items():
        manifest = read_manifest(directory)
        found[name] = "" if manifest is None else manifest.artifact_id
    return found


def require_unchanged(sources: Mapping[str, Path], inputs: Mapping[str, str]) -> None:
    """A trial is what its samples are: they must still be those it was planned with.

    Raises:
        UserError: an artifact is another one by now.
    """
    for name, found in identities(sources).items():
        if found != inputs[name]:
            raise UserError(
                f"{sources[name]} was written anew after this study had begun, so a trial would "
                "train on other samples than its manifest says; run the same command again"
            )


def require_same_files(planned: Mapping[str, str], found: Mapping[str, str]) -> None:
    """A trial's tables are placed by the files it was planned with.

    Args:
        planned: their checksums when the study began, by the key of `embedding.sharding`.
        found: the same now.

    Raises:
        UserError: a file is another one by now, or gone.
    """
    for name, checksum in planned.items():
        if found.get(name) != checksum:
            raise UserError(
                f"the file of embedding.sharding.{name} has changed since this study began, so a "
                "trial would run with other tables' places than its manifest says; run the same "
                "command again"
            )

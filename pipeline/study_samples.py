"""Samples of a study: which variants share a directory of them, and that they stay the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedding.errors import UserError
from multimodal.codes_config import ColumnVectors
from pipeline.align_stage import alignment_settings
from pipeline.artifacts import config_hash, read_manifest
from pipeline.config import Recipe
from pipeline.identity import content_config, ingest_config, samples_config


def samples_key(recipe: Recipe) -> str:
    """Names the data of a variant: equal only where all artifacts from ingest to join are equal."""
    codes: dict[str, Any] = {}
    if recipe.codes is not None:
        codes = {**recipe.codes.quantized, "force_on": [*map(str, recipe.codes.refit.force_on)]}
        if not isinstance(recipe.codes.vectors, ColumnVectors):
            codes["alignment"] = alignment_settings(recipe)
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

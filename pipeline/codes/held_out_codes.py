"""Codebooks that know held-out items: codes of such make figures of new items too good.

Codebooks that were fitted to held-out items - and an alignment behind those, which pairs the same
items by what users did with them - flatter an evaluation of items that no training has seen, and
nothing in the report would tell by how much. So a warning does not do, whether codes are made here
or taken from elsewhere. It is the items that count, not the settings: codebooks whose makers held
out these items and more know none.
"""

from pathlib import Path

from embedding.errors import UserError
from multimodal.codes.store import read_fitted_ids
from multimodal.codes.versions import lineage
from pipeline.codes.paths import codebook_versions
from pipeline.config import HeldOutItems, Recipe
from pipeline.samples.held_out import is_held_out


def held_out_fault(root: Path, version: str, held_out: HeldOutItems | None) -> str | None:
    """Which codebooks behind a version were fitted to held-out items; None: none were.

    Args:
        root: directory of the codebook versions.
        version: it and all that it goes on with: a fit starts from those, so it forgets nothing.
        held_out: the recipe's.

    Returns:
        A main clause, to be followed by what to do.

    Raises:
        UserError: an unknown version, or one that cannot be read.
    """
    if held_out is None:
        return None
    for name in lineage(root, version):
        fitted_ids = read_fitted_ids(root / name)
        known = 0 if fitted_ids is None else int(is_held_out(fitted_ids, held_out).sum())
        if fitted_ids is not None and known:
            which = name if name == version else f"{name}, which {version} goes on with,"
            return (
                f"codebooks {which} were fitted to {len(fitted_ids)} items, {known} of them held "
                f"out here (evaluation.held_out_items: share={held_out.share:g}, "
                f"seed={held_out.seed})"
            )
    return None


def require_unknown(recipe: Recipe, out: Path) -> None:
    """Check the codebooks that a recipe names; nothing to do where it names none.

    Raises:
        UserError: they know items that it holds out, or cannot be read.
    """
    version = None if recipe.codes is None else recipe.codes.version
    if version is None:
        return
    fault = held_out_fault(codebook_versions(out), version, recipe.evaluation.held_out_items)
    if fault is not None:
        raise UserError(
            f"codes.version={version}: {fault}; leave codes.version out, and codebooks are fitted "
            "anew without them"
        )

"""The report's section on item vectors: how they were aligned, on which pairs of items."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.codes.config import AlignedVectors, ColumnVectors, TowerVectors
from pipeline.artifacts import read_manifest
from pipeline.codes.align_facts import AlignFacts, PairFacts, PairSample
from pipeline.config import Recipe
from pipeline.console import duration
from pipeline.reports.item_cards import ItemCard, item_cards, shown_catalogue

_STAGE = "align"
_LIKE = {
    "item2item": "Item2Item: users engaged with both (Swing)",
    "user2item": "User2Item: a user's positive and the earlier one most like it",
}
_SPACES = {
    "ranker": "the item table of the ranker that the run started from",
    "factorisation": "a factorisation of the positives",
}
_WITHOUT = {
    "target_without_vector": "its item has no ID vector yet",
    "no_earlier_positive": "the user's first",
    "no_other_item_with_vector": "no other earlier item with an ID vector of its own",
}


@dataclass(frozen=True)
class ShownPair:
    """A pair as two cards."""

    first: ItemCard
    second: ItemCard
    similarity: str


@dataclass(frozen=True)
class ShownSource:
    """Some pairs of one source."""

    title: str
    pairs: list[ShownPair]


def align_section(recipe: Recipe, directory: Path) -> dict[str, Any] | None:
    """What the report says about item vectors; None for a run without codes.

    Args:
        recipe: of the run.
        directory: of the run.
    """
    if recipe.codes is None:
        return None
    if recipe.codes.taken_from is not None:
        return _section(
            f"Codes are taken from the runs of {recipe.codes.taken_from}, whose reports say how "
            "item vectors were made: nothing is aligned here."
        )
    match recipe.codes.vectors:
        case ColumnVectors(column=column, encoder=encoder):
            said = f"Item vectors are the column {column} of items.parquet (encoder {encoder})"
            return _section(f"{said}: no pairs are mined, and nothing is aligned.")
        case TowerVectors():
            items = _items(_facts(directory))
            return _section(
                f"Item vectors are standardised mean tokens of frozen towers, {items}: no pairs "
                "are mined, and nothing is aligned."
            )
        case AlignedVectors() as source:
            return _aligned(recipe, source, directory)


def trained_run(directory: Path) -> Path | None:
    """Directory of the run that trained the encoder of this one; None where it is not there."""
    manifest, run = read_manifest(directory / _STAGE, AlignFacts), directory
    encoder = None if manifest is None else manifest.facts.encoder
    while manifest is not None and manifest.facts.encoder == encoder:
        if manifest.facts.training is not None:
            return run
        if manifest.facts.previous is None:
            return None
        run = directory.parent / manifest.facts.previous
        manifest = read_manifest(run / _STAGE, AlignFacts)
    return None


def _aligned(recipe: Recipe, source: AlignedVectors, directory: Path) -> dict[str, Any]:
    facts = _facts(directory)
    said = f"Item vectors are those of a content encoder, {_items(facts)}. "
    run = trained_run(directory)
    if run is None:
        return _section(f"{said}It was trained up to {facts.trained_on}; that run is gone.")
    trained = _facts(run)
    pairs, training = trained.pairs, trained.training
    assert pairs is not None
    assert training is not None
    when = "in this run" if run == directory else f"in the run of {run.name}"
    said += (
        f"It was aligned {when} on pairs of {pairs.first_day} .. {pairs.last_day}: "
        f"{training.steps} steps in {duration(training.seconds)}, loss "
        f"{training.first_loss:.3f} -> {training.last_loss:.3f}, "
        f"temperature {training.temperature:.3g}."
    )
    return _section(
        said,
        sources=[
            {
                "name": name,
                "pairs": f"{mined:,}",
                "trained": f"{training.num_pairs.get(name, 0):,}" if training.num_pairs else "-",
                "note": note,
            }
            for name, mined, note in _counts(pairs)
        ],
        bounds=_bounds(source, pairs),
        samples=_samples(recipe, pairs),
    )


def _section(said: str, **parts: list[Any]) -> dict[str, Any]:
    return {"said": said, "sources": [], "bounds": [], "samples": [], **parts}


def _facts(directory: Path) -> AlignFacts:
    manifest = read_manifest(directory / _STAGE, AlignFacts)
    assert manifest is not None, directory
    return manifest.facts


def _items(facts: AlignFacts) -> str:
    said = f"{facts.num_items:,} items, {facts.num_encoded:,} of them encoded in this run"
    if facts.num_without_content:
        said += f", {facts.num_without_content:,} without content"
    return said


def _counts(pairs: PairFacts) -> list[tuple[str, int, str]]:
    """Name, number and a note of each source that was asked for."""
    found = [
        (
            "item2item",
            pairs.item2item_pairs,
            f"neighbours of {pairs.item2item_items:,} items, from the lists of "
            f"{pairs.num_users:,} users",
        )
    ]
    if pairs.id_space is not None:
        reasons = [
            f"{number:,} without ({_WITHOUT.get(reason, reason)})"
            for reason, number in pairs.user2item_without.items()
            if number
        ]
        note = "; ".join([f"of {pairs.num_positives:,} positives", *reasons])
        found.append(("user2item", pairs.user2item_pairs, note))
    return found


def _bounds(source: AlignedVectors, pairs: PairFacts) -> list[str]:
    swing = source.swing
    said = [
        f"{pairs.num_cut_users:,} of {pairs.num_users:,} users have more than "
        f"{swing.max_items_per_user} items: a sample of them counts",
        f"{pairs.num_cut_items:,} items have more than {swing.max_users_per_item} users: a sample "
        "of them counts",
    ]
    if pairs.id_space is not None:
        said.append(f"User2Item pairs are alike by {_SPACES[pairs.id_space]}")
    return said


def _samples(recipe: Recipe, pairs: PairFacts) -> list[ShownSource]:
    kept: dict[str, PairSample] = {name: some for name, some in pairs.samples.items() if some}
    if not kept:
        return []
    ids = [item for some in kept.values() for pair in some for item in pair[:2]]
    cards = item_cards(shown_catalogue(recipe), np.unique(np.array(ids, np.int64)))
    return [
        ShownSource(
            _LIKE[name],
            [ShownPair(cards[one], cards[two], f"{value:.3g}") for one, two, value in some],
        )
        for name, some in kept.items()
    ]

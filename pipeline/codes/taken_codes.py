"""Codes that the runs of another output directory made, for a ranker with code tables of its own.

    DIR/DATE/quantize/codes.parquet, DIR/codebooks/v0001, v0002     made by the other recipe's runs
    OUT/DATE/quantize/codes.parquet, OUT/codebooks/v0001, v0002     the same files under other names

The quantize stage links the codes of its date, and the codebooks that they belong to with all that
those go on with. So whoever reads codes or codebooks reads OUT alone, rows of code tables go over
every refit that lies between two runs, and what is removed from DIR later is not missed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.files import link_or_copy
from embedding.raw_ids import to_raw_ids
from multimodal.codes.config import Codes
from multimodal.codes.figures import RefitDecision
from multimodal.codes.versions import take_version
from pipeline.artifacts import Manifest, damaged_files, read_manifest
from pipeline.codes.features import CODES_FILE, read_codes
from pipeline.codes.held_out_codes import held_out_fault
from pipeline.codes.paths import codebook_versions, coded_dates, codes_directory, codes_version
from pipeline.codes.quantize import codes_of, stability_of_items
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.config import Recipe
from pipeline.recipe import RECIPE_FILE
from pipeline.samples.contract import read_columns


@dataclass(frozen=True)
class TakenCodes:
    """The codes of another output directory, as a run of one date takes them."""

    recipe: Recipe
    """One with `codes.taken_from`."""
    out: Path
    """Output directory of the run."""
    date: str

    @property
    def origin(self) -> Path:
        """Output directory that makes the codes."""
        assert self._codes.taken_from is not None
        return self._codes.taken_from

    def require(self) -> None:
        """Check all that can be said before any stage runs.

        Raises:
            UserError: there are no codes to take, or others than this recipe states.
        """
        if self.origin.resolve() == self.out.resolve():
            raise UserError(
                f"codes.taken_from={self.origin} is the output directory itself; name the one "
                "whose runs make the codes, or leave taken_from out to make them here"
            )
        if not self._outlives_its_origin:
            self._require_settings(self._manifest())

    def inputs(self, own: dict[str, str]) -> dict[str, str]:
        """What the artifact is made of: the other artifact, what it holds, and `own` inputs.

        The checksum, too: equal identities that were made twice need not hold equal codes.
        """
        if self._outlives_its_origin:
            recorded = read_manifest(codes_directory(self.out, self.date))
            assert recorded is not None
            return recorded.inputs
        manifest = self._manifest()
        return {"taken": manifest.artifact_id, "codes": manifest.checksums[CODES_FILE], **own}

    def take(self, scratch: Path, previous: str | None) -> tuple[int, QuantizeFacts]:
        """Link the codes into `scratch` and their codebooks into OUT.

        Args:
            scratch: an existing directory.
            previous: date of the run of OUT that these codes are compared with.

        Returns:
            Items of the catalogue, and what the other run did, as far as it is true of this one.

        Raises:
            UserError: there are no codes to take, others than this recipe states, or their
                codebooks know items that this recipe holds out.
        """
        manifest = self._manifest()
        self._require_settings(manifest)
        source = codes_directory(self.origin, self.date)
        damaged = damaged_files(source, thorough=True)
        if damaged:
            raise UserError(
                f"{source / damaged[0]} is missing or damaged (its SHA-256 is not the recorded "
                f"one); delete {source}, and make the codes again: "
                f"{self._again(manifest)}"
            )
        facts = manifest.facts
        self._require_unknown(facts.version)
        take_version(codebook_versions(self.origin), codebook_versions(self.out), facts.version)
        link_or_copy(source / CODES_FILE, scratch / CODES_FILE)
        if read_manifest(source, QuantizeFacts) != manifest:
            raise UserError(f"{source} was written anew at this moment; run the same command again")
        num_items, num_without = self._count(scratch / CODES_FILE)
        facts = self._seen_from_here(facts, scratch / CODES_FILE, previous)
        own = {
            "previous": previous,
            "num_without_vector": num_without,
            "taken_from": str(self.origin.absolute()),
        }
        return num_items, facts.model_copy(update=own)

    @property
    def _codes(self) -> Codes:
        assert self.recipe.codes is not None
        return self.recipe.codes

    @property
    def _outlives_its_origin(self) -> bool:
        """Whether these codes were taken, and are gone where they were made: they stay then."""
        recorded = read_manifest(codes_directory(self.out, self.date), QuantizeFacts)
        return (
            recorded is not None
            and recorded.facts.taken_from == str(self.origin.absolute())
            and read_manifest(codes_directory(self.origin, self.date)) is None
        )

    def _manifest(self) -> Manifest[QuantizeFacts]:
        """Of the codes to take."""
        if not self.origin.is_dir():
            raise UserError(
                f"codes.taken_from={self.origin} is no directory; name the output directory of "
                f"the runs that make the codes, or make them: {self._command()}"
            )
        manifest = read_manifest(codes_directory(self.origin, self.date), QuantizeFacts)
        if manifest is None:
            known = ", ".join(coded_dates(self.origin)) or "none"
            raise UserError(
                f"codes.taken_from={self.origin} holds no codes of {self.date} (there are: "
                f"{known}); make them first: {self._command()}"
            )
        return manifest

    def _command(self) -> str:
        """What makes the codes."""
        dates = coded_dates(self.origin)
        recipe = self.origin / dates[-1] / RECIPE_FILE if dates else "RECIPE"
        return f"`braid stage quantize --recipe {recipe} --date {self.date} --out {self.origin}`"

    def _again(self, manifest: Manifest[QuantizeFacts]) -> str:
        """What makes codes anew with the codebooks that they had.

        Others would know nothing of those that later days go on with.
        """
        return f"{self._command()[:-1]} --set codes.version={manifest.facts.version}`"

    def _require_settings(self, manifest: Manifest[QuantizeFacts]) -> None:
        theirs, ours = manifest.facts.settings, self._codes.shared
        what = f"codes.taken_from={self.origin}: the codes of {self.date}"
        if theirs["format"] != ours["format"]:
            raise UserError(
                f"{what} were made by another version of Braid; delete "
                f"{codes_directory(self.origin, self.date)} and make them again: "
                f"{self._again(manifest)}"
            )
        compared = ("rq", "vq", "suffix")
        there, here = ({name: settings[name] for name in compared} for settings in (theirs, ours))
        differing = [
            f"{path}={json.dumps(one)} there, {json.dumps(other)} here"
            for path, one, other in _differences(there, here, "codes")
        ]
        if differing:
            raise UserError(
                f"{what} have other settings than this recipe: {'; '.join(differing)}; set these "
                "to what they are there, or take codes of another directory"
            )
        if ours["vector_dims"] > theirs["vector_dims"]:
            raise UserError(
                f"{what} hold {theirs['vector_dims']} elements of the item vectors, and "
                f"codes.features.vector_dims={ours['vector_dims']} asks for more; lower it, or "
                f"make them again with codes.features.vector_dims={ours['vector_dims']}: "
                f"{self._again(manifest)}"
            )

    def _require_unknown(self, version: str) -> None:
        """Refuse codebooks that know held-out items (`pipeline.codes.held_out_codes`)."""
        held_out = self.recipe.evaluation.held_out_items
        fault = held_out_fault(codebook_versions(self.origin), version, held_out)
        if fault is not None:
            raise UserError(
                f"codes.taken_from={self.origin}: {fault}; make codes with the same "
                "evaluation.held_out_items in a directory of their own"
            )

    def _count(self, codes: Path) -> tuple[int, int]:
        """Items of this recipe's catalogue, and those of them without codes."""
        path = self.recipe.data.root / "items.parquet"
        ids = to_raw_ids(read_columns(path, ["item_id"])["item_id"]).to_numpy()
        has_codes = np.isin(ids, pq.read_table(codes, columns=["item_id"])["item_id"].to_numpy())
        if not has_codes.any():
            raise UserError(
                f"codes.taken_from={self.origin}: none of the {len(ids)} items of {path} has codes "
                f"of {self.date} there; name the directory of runs over this catalogue, or write "
                "item_id alike in both"
            )
        return len(ids), int((~has_codes).sum())

    def _seen_from_here(
        self, facts: QuantizeFacts, codes: Path, previous: str | None
    ) -> QuantizeFacts:
        """The figures that compare with the run before: that of OUT, whichever days it has."""
        facts = facts.model_copy(update={"stability": None, "num_encoded": None})
        if previous is None:
            return facts
        before = codes_directory(self.out, previous)
        now = read_codes(codes.parent)
        kept = stability_of_items(read_codes(before), now["item_id"].to_numpy(), codes_of(now))
        decision, old = facts.refit, codes_version(before)
        if old is not None and old != facts.version and not decision.refit:
            reason = f"after {previous}, whose codes are of {old}"
            decision = RefitDecision(refit=True, reasons=(reason,))
        return facts.model_copy(update={"stability": kept, "refit": decision})


def require_codes(recipe: Recipe, out: Path, date: str) -> None:
    """Check the codes that a run of a date would take; nothing to do where it takes none.

    Raises:
        UserError: see `TakenCodes.require`.
    """
    if recipe.codes is not None and recipe.codes.taken_from is not None:
        TakenCodes(recipe, out, date).require()


def _differences(there: Any, here: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Paths at which two settings differ, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}")
    elif there != here:
        yield path, there, here

"""The quantize stage: the codes of all items for the run of one date.

Reads items.parquet, the events of every item up to the date, and the codes of the run before.
Writes `codes.parquet`; new codebooks go to OUT/codebooks, which all runs share. A recipe may take
the codes of another output directory instead (`pipeline.codes.taken_codes`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date as calendar_date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.markup import escape

from multimodal.codes.config import ColumnVectors
from multimodal.codes.versions import named_version
from pipeline.artifacts import read_manifest
from pipeline.cluster import RaySession
from pipeline.codes.align_stage import AlignmentOfDay
from pipeline.codes.encode_items import Machines
from pipeline.codes.encode_workers import RayPieces
from pipeline.codes.features import CODES_FILE, read_codes
from pipeline.codes.held_out_codes import held_out_fault, require_unknown
from pipeline.codes.item_vectors import ItemVectors, read_column_vectors
from pipeline.codes.kept_codes import KeptCodes
from pipeline.codes.paths import (
    STAGE,
    codebook_versions,
    coded_dates,
    codes_directory,
    codes_version,
)
from pipeline.codes.quantize import quantize
from pipeline.codes.quantize_facts import Quantized, QuantizeFacts, collapse_warning
from pipeline.codes.taken_codes import TakenCodes, require_codes
from pipeline.config import Recipe
from pipeline.console import Reporter
from pipeline.days import Split
from pipeline.samples.held_out import is_held_out
from pipeline.stages import StageOutput, StageSpec
from pipeline.train import CodebookChange


@dataclass(frozen=True)
class CodesOfDay:
    """The codes of one run; its recipe has `codes`."""

    recipe: Recipe
    out: Path
    date: str
    first_day: str
    """Of the event log."""
    alignment: AlignmentOfDay | None
    """Makes the vectors; None: they are a column of the catalogue, or the codes are taken."""
    taken: TakenCodes | None
    """From another output directory; None: this one makes its own."""
    session: RaySession
    """Started where codes of many items are looked up."""
    reporter: Reporter

    @property
    def directory(self) -> Path:
        """Where the stage publishes."""
        return self._directory(self.date)

    @property
    def file(self) -> Path:
        """The codes."""
        return self.directory / CODES_FILE

    @property
    def fingerprint(self) -> str:
        """Of the codes: equal for equal codes, whichever run wrote them."""
        manifest = read_manifest(self.directory)
        return "" if manifest is None else manifest.checksums[CODES_FILE]

    @property
    def codebooks(self) -> str | None:
        """Whose codes these are; None before the stage ran."""
        manifest = read_manifest(self.directory, QuantizeFacts)
        return None if manifest is None else manifest.facts.codebooks

    def change_since(self, before: str | None) -> CodebookChange | None:
        """What a training must do to the code tables that it starts from.

        Args:
            before: the codebooks of the samples that those tables were trained on, as the facts of
                that training name them: its run may have been given other codes since.

        Raises:
            UserError: these codebooks are no longer there, so nobody knows what the rows mean.
        """
        after = self.codebooks
        if before is None or after is None or before == after:
            return None
        root = codebook_versions(self.out).absolute()
        return CodebookChange(
            root=root, before=named_version(root, before), after=named_version(root, after)
        )

    def specs(
        self, name: str, catalogue: str, ingests: tuple[Path, ...], parent: str | None
    ) -> Iterator[StageSpec]:
        """The execution of `align`, where vectors are made, or of `quantize`.

        Args:
            name: of the stage; those before it must have run.
            catalogue: fingerprint of the files of items and users.
            ingests: ingest artifacts that hold the training days, oldest first.
            parent: date of the run whose model this one starts from.
        """
        if name == STAGE:
            yield self._spec(catalogue)
        elif self.alignment is not None:
            yield self.alignment.spec(catalogue, ingests, parent)

    def _spec(self, catalogue: str) -> StageSpec:
        codes = self.recipe.codes
        assert codes is not None
        previous = self._previous()
        if self.taken is not None:
            return self._spec_of_taken(self.taken, catalogue, previous)
        forced = calendar_date.fromisoformat(self.date) in codes.refit.force_on
        inputs = {"catalogue": catalogue, "ingest": self._artifact_id("ingest", self.date)}
        if self.alignment is not None:
            inputs["align"] = self._artifact_id("align", self.date)
        if previous is not None:
            inputs["previous"] = self._artifact_id(STAGE, previous)
        return StageSpec(
            STAGE,
            self.directory,
            {"codes": codes.quantized, "forced": forced, "held_out": self._held_out},
            inputs,
            lambda scratch: self._write(scratch, previous, force_refit=forced),
        )

    def _spec_of_taken(self, taken: TakenCodes, catalogue: str, previous: str | None) -> StageSpec:
        codes = self.recipe.codes
        assert codes is not None
        own = {"catalogue": catalogue}
        if previous is not None:
            own["previous"] = self._artifact_id(STAGE, previous)

        def body(scratch: Path) -> StageOutput:
            num_items, facts = taken.take(scratch, previous)
            num_coded = num_items - facts.num_without_vector
            return StageOutput(num_items, num_coded, facts, warnings=self._say(facts, previous))

        config = {"taken": codes.shared, "held_out": self._held_out}
        return StageSpec(STAGE, self.directory, config, taken.inputs(own), body)

    @property
    def _held_out(self) -> dict[str, Any] | None:
        config = self.recipe.evaluation.held_out_items
        return None if config is None else config.model_dump(mode="json")

    def _write(self, scratch: Path, previous: str | None, *, force_refit: bool) -> StageOutput:
        codes = self.recipe.codes
        assert codes is not None
        if self.alignment is not None:
            found = self.alignment.vectors()
        else:
            assert isinstance(codes.vectors, ColumnVectors)
            found = read_column_vectors(self.recipe.data.root, codes.vectors)
        counts = pq.read_table(self.out / self.date / "ingest" / "item_counts.parquet")
        earlier, before, kept = None, None, None
        if previous is not None:
            kept = KeptCodes.read(self._directory(previous))
            earlier = read_codes(self._directory(previous)) if kept is None else kept.codes
            before = codes_version(self._directory(previous))
        seen_N = np.isin(found.item_ids_N, counts["item_id"].to_numpy())
        held_out = self.recipe.evaluation.held_out_items
        if held_out is not None:
            seen_N &= ~is_held_out(found.item_ids_N, held_out)
        items = ItemVectors(
            found.item_ids_N,
            found.vectors_ND,
            found.encoder,
            self.first_day,
            self.date,
            earlier,
            before,
            seen_N,
            kept,
            found.file,
        )
        self._say_fault(previous)
        root = codebook_versions(self.out)
        machines = Machines(RayPieces(self.session, self.reporter.advance))
        done = quantize(codes, items, root, scratch, force_refit=force_refit, machines=machines)
        facts = QuantizeFacts(
            **dict(done),
            previous=previous,
            num_without_vector=found.num_without,
            settings=codes.shared,
            taken_from=None,
        )
        num_items = done.num_items + found.num_without
        return StageOutput(num_items, done.num_items, facts, warnings=self._say(done, previous))

    def _say_fault(self, previous: str | None) -> None:
        """Why the latest codes before these are not gone on with, if that is for held-out items."""
        latest = next(iter(self._earlier_days()), None)
        if latest is not None and latest != previous and (fault := self._fault_of(latest)):
            self.reporter.line(escape(f"  {fault}: codes of {latest} are not gone on with"))

    def _say(self, done: Quantized, previous: str | None) -> tuple[str, ...]:
        before = None if previous is None else codes_version(self._directory(previous))
        self.reporter.line(escape(f"  {decision_line(done, before)}"))
        return self.reporter.warn(filter(None, [collapse_warning(done.mean_cosine)]))

    def _previous(self) -> str | None:
        """Date of the run whose codes these go on with: the latest earlier one that may be."""
        recorded = read_manifest(self.directory, QuantizeFacts)
        # Codes that were taken before go on with others than those that are made now.
        if recorded is not None and (recorded.facts.taken_from is None) == (not self.taken):
            day = recorded.facts.previous
            if day is None:
                return None
            is_same = self._artifact_id(STAGE, day) == recorded.inputs["previous"]
            if is_same and self._fault_of(day) is None:
                return day
        return next((day for day in self._earlier_days() if self._fault_of(day) is None), None)

    def _earlier_days(self) -> list[str]:
        """Dates of the runs before this one that have codes of its kind, the latest first.

        Codes that are made here do not go on with codes that were taken: their vectors are
        another's, even where column and encoder have the same names.
        """
        days = [day for day in reversed(coded_dates(self.out)) if day < self.date]
        return days if self.taken else [day for day in days if self._makes_its_own(day)]

    def _makes_its_own(self, day: str) -> bool:
        manifest = read_manifest(self._directory(day), QuantizeFacts)
        return manifest is None or manifest.facts.taken_from is None

    def _fault_of(self, day: str) -> str | None:
        """Why codes that are made here must not go on with those of a day; None: they may.

        The run of that day may have held out nothing, or other items (`held_out_fault`).
        """
        version = None if self.taken else codes_version(self._directory(day))
        if version is None:
            return None
        held_out = self.recipe.evaluation.held_out_items
        return held_out_fault(codebook_versions(self.out), version, held_out)

    def _directory(self, day: str) -> Path:
        return codes_directory(self.out, day)

    def _artifact_id(self, stage: str, day: str) -> str:
        manifest = read_manifest(self.out / day / stage)
        return "" if manifest is None else manifest.artifact_id


def codes_of_day(
    recipe: Recipe, out: Path, split: Split, session: RaySession, reporter: Reporter
) -> CodesOfDay | None:
    """The codes of a run; None for a recipe without.

    Raises:
        UserError: they are taken from a directory that does not have them, or has others, or are
            those of named codebooks that know items which the recipe holds out.
    """
    if recipe.codes is None:
        return None
    require_unknown(recipe, out)
    date, alignment, taken = split.known[-1], None, None
    if recipe.codes.has_alignment:
        alignment = AlignmentOfDay(recipe, out, date, split.train, session, reporter)
    if recipe.codes.taken_from is not None:
        require_codes(recipe, out, date)
        taken = TakenCodes(recipe, out, date)
    return CodesOfDay(recipe, out, date, split.known[0], alignment, taken, session, reporter)


def decision_line(facts: Quantized, before: str | None) -> str:
    """One line: which codebooks code the items, and why."""
    metrics = facts.metrics
    line = f"codebooks {facts.version}"
    if facts.refit.refit:
        line += f", fitted anew ({'; '.join(facts.refit.reasons)})"
    elif before is not None:
        line += ", unchanged"
    if metrics is not None:
        line += f": collisions {metrics.collision_rate:.1%}"
    if facts.stability is not None:
        line += f", stability {facts.stability.full:.1%}"
    if facts.num_encoded is not None and facts.num_encoded < facts.num_items:
        line += f"; {facts.num_encoded:,} of {facts.num_items:,} items looked up"
    return line

"""The align stage: vectors of all items for the run of one date (`pipeline.codes.align`).

The first run trains the encoder; later ones encode what is new, until the realign policy asks for a
training that goes on from the last one. A new encoder moves all vectors.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedding.item_columns import candidate_feature
from multimodal.codes.config import AlignedVectors, ColumnVectors, TowerVectors
from multimodal.content_config import ContentConfig
from pipeline.artifacts import config_hash, read_manifest
from pipeline.cluster import RaySession, rank_bundles
from pipeline.codes.align import (
    ENCODER,
    IDS,
    INDEX,
    PAIR_ROWS,
    PAIRS,
    RESULT,
    VECTORS,
    AlignJob,
    changed_rows,
    encoder_config,
    encoder_identity,
    merge_vectors,
    mine,
    same_towers,
    take_known_pairs,
)
from pipeline.codes.align_facts import AlignFacts, AlignmentResult, PairFacts
from pipeline.codes.item_vectors import CatalogueVectors
from pipeline.codes.positives import PairSource
from pipeline.codes.ranker_vectors import RankerItems
from pipeline.config import Recipe
from pipeline.console import Reporter
from pipeline.content.facts import ContentFacts
from pipeline.content.reading import CatalogueReading
from pipeline.content.stage import STORES, content
from pipeline.days import parse_day
from pipeline.refusal import refusing_once
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.stages import StageOutput, StageSpec
from pipeline.train import CHECKPOINT
from pipeline.train_facts import TrainFacts
from pipeline.worker_group import run_workers

STAGE = "align"
_SPACES = {"ranker": "the item table of the ranker", "factorisation": "a factorisation"}
_OF_THE_RANKER = {
    *("gradient", "cic", "optimizer", "placement", "precision", "tokens", "in_history"),
}
"""Settings of content that an alignment does not depend on."""


@dataclass(frozen=True)
class AlignmentOfDay:
    """The item vectors of one run whose codes are not made of a column."""

    recipe: Recipe
    out: Path
    date: str
    training_days: tuple[str, ...]
    """Days that pairs may come from."""
    session: RaySession
    reporter: Reporter

    @property
    def directory(self) -> Path:
        """Where the stage publishes."""
        return self.out / self.date / STAGE

    @property
    def source(self) -> AlignedVectors | TowerVectors:
        """The recipe's."""
        assert self.recipe.codes is not None
        source = self.recipe.codes.vectors
        assert not isinstance(source, ColumnVectors)
        return source

    @property
    def content(self) -> ContentConfig:
        """What the encoder is built from."""
        return _encoder(self.recipe, self.source)

    def vectors(self) -> CatalogueVectors:
        """What the stage wrote; the vectors are memory-mapped, copy on write."""
        manifest = read_manifest(self.directory, AlignFacts)
        assert manifest is not None
        return CatalogueVectors(
            np.load(self.directory / IDS),
            np.load(self.directory / VECTORS, mmap_mode="c"),
            f"{self.source.kind}:{manifest.facts.encoder}",
            manifest.facts.num_without_content,
            self.directory / VECTORS,
        )

    def spec(self, catalogue: str, ingests: tuple[Path, ...], parent: str | None) -> StageSpec:
        """The execution of the stage.

        Args:
            catalogue: fingerprint of the files of items and users.
            ingests: ingest artifacts that hold the training days, oldest first.
            parent: date of the run whose ranker this one starts from.
        """
        previous = self._previous()
        inputs = {"catalogue": catalogue}
        bundles = rank_bundles(self.recipe.cluster)
        reading = CatalogueReading(
            self.content, self.recipe.data, lambda: self.session.wait_for(STAGE, bundles)
        )
        ranker = self._ranker(parent)
        if isinstance(self.source, AlignedVectors):
            inputs["ingest"] = _artifact_id(ingests[-1])
        if ranker is not None:
            inputs["ranker"] = _artifact_id(ranker.checkpoints.parent)
        if previous is not None:
            inputs["previous"] = _artifact_id(previous)
        settings = alignment_settings(self.recipe)
        config: dict[str, Any] = {"settings": settings, "days": self.training_days}
        if isinstance(self.source, AlignedVectors):
            config["realign_every_days"] = self.source.realign_every_days
        return StageSpec(
            STAGE,
            self.directory,
            config,
            inputs,
            lambda scratch: self._write(scratch, reading, previous, ingests, ranker),
            more_inputs=reading.more_inputs,
        )

    def _write(
        self,
        scratch: Path,
        reading: CatalogueReading,
        previous: Path | None,
        ingests: tuple[Path, ...],
        ranker: RankerItems | None,
    ) -> StageOutput:
        index = scratch / INDEX
        index.mkdir()
        tokens = content(reading.take(), self.out / STORES, index, self.reporter.advance)
        earlier = previous if previous is not None and self._fits(previous, index) else None
        trains = isinstance(self.source, AlignedVectors) and self._is_due(earlier)
        pairs = None
        if trains and isinstance(self.source, AlignedVectors):
            (scratch / PAIRS).mkdir()
            source = self._pair_source(ingests)
            pairs = mine(source, self.source, ranker, scratch / PAIRS)
            take_known_pairs(scratch / PAIRS, index, scratch / PAIR_ROWS)
        job = self._job(scratch, earlier, trains=trains)
        # A new encoder moves all vectors.
        known = None if trains else earlier
        np.save(job.rows, changed_rows(index, known))
        run_workers(_worker, job, self.recipe.cluster, scratch)
        day = None if previous is None else previous.parent.name
        facts = self._facts(job, known, day, tokens, pairs)
        job.rows.unlink()
        if job.pairs is not None:
            shutil.rmtree(job.pairs)
        return StageOutput(tokens.num_items, facts.num_items, facts)

    def _job(self, scratch: Path, earlier: Path | None, *, trains: bool) -> AlignJob:
        training = self.source if isinstance(self.source, AlignedVectors) and trains else None
        steps = 0
        if training is not None:
            steps = training.num_steps if earlier is None else training.warm_steps
        return AlignJob(
            content=self.content,
            training=training,
            num_steps=steps,
            index=(scratch / INDEX).absolute(),
            stores=(self.out / STORES).absolute(),
            pairs=(scratch / PAIR_ROWS).absolute() if trains else None,
            state=None if earlier is None else (earlier / ENCODER).absolute(),
            standardised=isinstance(self.source, TowerVectors),
            rows=(scratch / "rows.npy").absolute(),
            output=scratch.absolute(),
        )

    def _facts(
        self,
        job: AlignJob,
        known: Path | None,
        previous: str | None,
        tokens: ContentFacts,
        pairs: PairFacts | None,
    ) -> AlignFacts:
        num_encoded = len(np.load(job.rows))
        num_items, num_without = merge_vectors(job, known)
        training = None
        if job.training is not None:
            path = job.output / RESULT
            training = AlignmentResult.model_validate_json(path.read_text())
            assert pairs is not None
            by = f" (alike by {_SPACES[pairs.id_space]})" if pairs.id_space else ""
            self.reporter.line(
                f"  aligned on {pairs.item2item_pairs} item2item and {pairs.user2item_pairs} "
                f"user2item pairs{by}: loss {training.first_loss:.3f} -> {training.last_loss:.3f}"
            )
        manifest = None if known is None else read_manifest(known, AlignFacts)
        trained_on = self.training_days[-1] if training else None
        if manifest is not None:
            trained_on = manifest.facts.trained_on
        return AlignFacts(
            encoder=encoder_identity(job.output / ENCODER, self.content, job.index),
            trained_on=trained_on,
            num_items=num_items,
            num_without_content=num_without,
            num_encoded=num_encoded,
            pairs=pairs,
            training=training,
            content=tokens,
            settings=config_hash(alignment_settings(self.recipe)),
            previous=previous,
        )

    def _pair_source(self, ingests: tuple[Path, ...]) -> PairSource:
        assert isinstance(self.source, AlignedVectors)
        histories = self.recipe.features.histories
        wanted = self.source.history or histories[0].name
        history = next(h for h in histories if h.name == wanted)
        held_out = self.recipe.evaluation.held_out_items
        share = 1.0 if history.label is None else _share_positive(ingests, history.label)
        return PairSource(ingests, self.training_days, history, held_out, share)

    def _ranker(self, parent: str | None) -> RankerItems | None:
        """The items of the ranker that this run starts from; None where pairs need none."""
        features = self.recipe.features
        looked_up = candidate_feature(features)
        source = self.source
        wanted = isinstance(source, AlignedVectors) and source.user2item is not None
        if parent is None or looked_up is None or not wanted:
            return None
        trained = read_manifest(self.out / parent / "train", TrainFacts)
        assert trained is not None
        return RankerItems(
            checkpoints=self.out / parent / "train" / CHECKPOINT,
            table=features.table(looked_up.table),
            counts=self.out / parent / "ingest" / "item_counts.parquet",
            last_day=trained.facts.days[-1],
        )

    def _is_due(self, earlier: Path | None) -> bool:
        if earlier is None:
            return True
        every = self.source.realign_every_days if isinstance(self.source, AlignedVectors) else None
        manifest = read_manifest(earlier, AlignFacts)
        if every is None or manifest is None:
            return False
        assert manifest.facts.trained_on is not None  # by the same settings
        trained_on = parse_day(manifest.facts.trained_on, STAGE)
        return (parse_day(self.training_days[-1], STAGE) - trained_on).days >= every

    def _fits(self, previous: Path, index: Path) -> bool:
        """Whether an encoder of before goes on; `index` points to the day's tokens."""
        manifest = read_manifest(previous, AlignFacts)
        settings = config_hash(alignment_settings(self.recipe))
        if manifest is None or manifest.facts.settings != settings:
            return False
        return same_towers(index, previous / INDEX)

    def _previous(self) -> Path | None:
        """The artifact that this one goes on with: the latest earlier one."""
        recorded = read_manifest(self.directory, AlignFacts)
        if recorded is not None:
            day = recorded.facts.previous
            if day is None:
                return None
            if _artifact_id(self.out / day / STAGE) == recorded.inputs["previous"]:
                return self.out / day / STAGE
        earlier = self.out.glob(f"????-??-??/{STAGE}/manifest.json")
        days = [path.parts[-3] for path in earlier]
        day = max((d for d in days if d < self.date), default=None)
        return None if day is None else self.out / day / STAGE


def _share_positive(ingests: Iterable[Path], label: str) -> float:
    """Of all events of some ingest artifacts."""
    rows = positives = 0
    for path in ingests:
        manifest = read_manifest(path, IngestFacts)
        assert manifest is not None, path
        rows += manifest.facts.rows_out
        positives += manifest.facts.labels[label].positives
    return positives / max(rows, 1)


def alignment_settings(recipe: Recipe) -> dict[str, Any]:
    """What makes vectors comparable with those of the run before; codes are not of a column."""
    assert recipe.codes is not None
    source, held_out = recipe.codes.vectors, recipe.evaluation.held_out_items
    assert not isinstance(source, ColumnVectors)
    encoder = _encoder(recipe, source)
    without_say = {"content", "realign_every_days"}
    if not encoder.has_dropout:
        without_say.add("items_per_chunk")
    return {
        "held_out": None if held_out is None else held_out.model_dump(mode="json"),
        "vectors": source.model_dump(mode="json", exclude=without_say),
        "content": encoder.model_dump(mode="json", exclude=_OF_THE_RANKER),
    }


def _encoder(recipe: Recipe, source: AlignedVectors | TowerVectors) -> ContentConfig:
    config = source.content or recipe.content
    assert config is not None  # checked with the recipe
    return encoder_config(source, config)


def _artifact_id(directory: Path) -> str:
    manifest = read_manifest(directory)
    return "" if manifest is None else manifest.artifact_id


def _worker(config: dict[str, str]) -> None:
    """Runs on every rank; torch's towers are imported here and not in the driver."""
    from pipeline.codes.align_worker import align_worker

    with refusing_once(AlignJob.model_validate_json(config["job"]).output):
        align_worker(config)

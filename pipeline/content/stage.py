"""Tokens of all items of a day, from the frozen lower layers of the towers, on Ray workers.

Reads the text and image columns of items.parquet. Computes the tokens of items whose content is
new or changed, adds them to the token stores that all runs of an output directory share, and writes
the index of the day (`multimodal.stored_content`). An item without a usable text or image stays in
the index, without tokens of that modality, and is counted by cause.

    DIR/content_tokens/<modality>-<fingerprint>/    stores
    DIR/<date>/content/                             index
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from multimodal.images import MISSING
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from multimodal.token_store import NO_ROW, CheckedPart, TokenStore, check_part
from multimodal.tower_files import (
    Tower,
    is_on_hub,
    require_commit,
    tower_fingerprint,
)
from pipeline.cluster import RaySession
from pipeline.config import Recipe
from pipeline.console import Reporter
from pipeline.content.facts import ContentFacts, ModalityFacts
from pipeline.content.reading import CatalogueReading, CheckedContent, DigestedContent
from pipeline.content.tasks import EncoderSettings, EncodeTask, NewRows
from pipeline.content.workers import encode_on_workers, worker_of
from pipeline.identity import content_config
from pipeline.reports.item_cards import item_names
from pipeline.stages import StageOutput, StageSpec
from pipeline.tasks import ROWS_PER_BUNDLE, stream_tasks

STORES = "content_tokens"
"""Directory of all token stores, below the output directory."""

Progress = Callable[[int, int], None]


def content(
    read: DigestedContent, stores: Path, scratch: Path, progress: Progress | None = None
) -> ContentFacts:
    """Make all items' tokens available and write the day's index into `scratch`.

    Needs an initialised Ray.

    Args:
        read: the catalogue and towers.
        stores: directory of all token stores.
        scratch: an existing directory.
        progress: called with items encoded and items to encode.

    Raises:
        UserError: a store or the catalogue is damaged, or too many images are.
    """
    checked, catalogue = read
    jobs = {
        name: _TowerJob(checked, name, tower, stores)
        for name, tower in checked.config.towers.items()
    }
    tasks = {name: job.tasks(catalogue) for name, job in jobs.items()}
    total = sum(task.num_items for todo in tasks.values() for task in todo)
    done = 0
    for name, job in jobs.items():
        for count in encode_on_workers(tasks[name], job.settings, checked.config.tokens):
            done += count
            if progress is not None:
                progress(done, total)
    ordered = catalogue.sort_values("item_id", ignore_index=True)
    places, modalities, facts = {}, {}, {}
    has_content_N = np.zeros(len(ordered), bool)
    for name, job in jobs.items():
        found = job.find(ordered)
        _refuse_unreadable(checked, name, found)
        places[name], modalities[name] = job.index(found)
        computed = sum(task.num_items for task in tasks[name])
        facts[name] = _facts(found, computed, job.stored_bytes(modalities[name].parts))
        has_content_N |= places[name].row_N != NO_ROW
    ids_N: Int64Array = ordered["item_id"].to_numpy()
    described = StoredContent(num_items=len(ids_N), modalities=modalities)
    write_index(scratch, ids_N, described, places)
    return ContentFacts(
        num_items=len(ids_N),
        num_without_content=int((~has_content_N).sum()),
        modalities=facts,
    )


class _TowerJob:
    """What one tower has stored, and what it lacks."""

    def __init__(self, checked: CheckedContent, name: str, tower: Tower, stores: Path) -> None:
        self.name = name
        self.tower = tower
        self.stage = checked.config.tokens
        identity = checked.fingerprints[name]
        self.store = TokenStore(stores / f"{name}-{identity}", identity, tower.precision)
        self.store.remove_unfinished()
        self.settings = EncoderSettings(
            checked.catalogue,
            tower,
            self.store.directory,
            identity,
            checked.widths[name],
            self.stage.items_per_batch,
            self.stage.items_per_part,
            use_gpu=self.stage.gpus_per_worker > 0,
        )

    def tasks(self, catalogue: pd.DataFrame) -> list[EncodeTask]:
        """Items whose content is not stored yet, in pieces that keep all workers busy.

        Those of a few items take row groups together: a day that changes a little of each adds few
        parts to the store, all of which training maps into memory.
        """
        known = self._join(catalogue)
        new = catalogue[known["part"].isna().to_numpy()]
        tasks: list[EncodeTask] = []
        waiting: list[NewRows] = []
        for group, rows in new.groupby("row_group"):
            # Every task reads its row groups from the start: no more of them than help.
            pieces = min(self.stage.num_workers, math.ceil(len(rows) / self.stage.items_per_part))
            for piece in np.array_split(np.arange(len(rows)), pieces):
                part = rows.iloc[piece]
                columns = (part[name].to_numpy() for name in ("row", "item_id", self.name))
                waiting.append(NewRows(int(group), *columns))
                if sum(len(found.rows_N) for found in waiting) >= self.stage.items_per_part:
                    tasks.append(EncodeTask(self.name, tuple(waiting)))
                    waiting = []
        if waiting:
            tasks.append(EncodeTask(self.name, tuple(waiting)))
        return tasks

    def find(self, catalogue: pd.DataFrame) -> pd.DataFrame:
        """The entry of every item: part, row, length, fault, is_cut."""
        found = self._join(catalogue)
        assert not found["part"].isna().any(), "every new item was encoded"
        return found

    def _join(self, catalogue: pd.DataFrame) -> pd.DataFrame:
        entries = self.store.entries().to_pandas()
        # A worker that died and was replaced may have written its items twice: both are the same.
        entries = entries.drop_duplicates(["item_id", "digest"], keep="last")
        wanted = catalogue[["item_id", self.name]].rename(columns={self.name: "digest"})
        return wanted.merge(entries, on=["item_id", "digest"], how="left")

    def index(self, found: pd.DataFrame) -> tuple[Places, StoredModality]:
        """Places of all items, and where their parts lie."""
        has_tokens_N = (found["row"] != NO_ROW).to_numpy()
        parts, part_N = found["part"].cat.categories, found["part"].cat.codes.to_numpy()
        used = np.unique(part_N[has_tokens_N])
        position = np.full(len(parts), NO_ROW)
        position[used] = np.arange(len(used))
        names = tuple(str(parts[i]) for i in used)
        places = Places(
            np.where(has_tokens_N, position[part_N], NO_ROW),
            found["row"].to_numpy(),
            found["length"].to_numpy(),
        )
        self.store.check(names, self._check_on_workers)
        return places, StoredModality(
            store=self.store.directory.name,
            fingerprint=self.settings.fingerprint,
            precision=self.tower.precision,
            hidden_size=self.settings.hidden_size,
            parts=names,
        )

    def _check_on_workers(self, parts: list[str]) -> Iterator[CheckedPart]:
        rows = [ROWS_PER_BUNDLE] * len(parts)  # a task each: they are read from end to end
        yield from stream_tasks(check_part, parts, self.store.directory.absolute(), rows)

    def stored_bytes(self, parts: tuple[str, ...]) -> int:
        """Size of these parts."""
        return sum((self.store.directory / f"{part}.safetensors").stat().st_size for part in parts)


def _refuse_unreadable(checked: CheckedContent, name: str, found: pd.DataFrame) -> None:
    """Fail where more values than allowed are there but cannot be used: an upload went wrong."""
    faulty = found[found["fault"].notna() & (found["fault"] != MISSING)]
    if len(faulty) <= checked.max_unreadable_share * len(found):
        return
    causes = ", ".join(f"{count} x {cause}" for cause, count in _causes(faulty).items())
    raw_id = int(faulty["item_id"].iloc[0])
    item, _ = item_names(checked.catalogue, np.array([raw_id]))[raw_id]
    raise UserError(
        f"{checked.catalogue.path}: the {name}s of {len(faulty)} of {len(found)} items cannot be "
        f"read, more than data.max_quarantined_share={checked.max_unreadable_share} allows "
        f"({causes}), among them that of item_id {item}; repair them, write null, or raise the "
        "limit"
    )


def _causes(found: pd.DataFrame) -> dict[str, int]:
    faults: dict[Any, int] = found["fault"].dropna().value_counts().to_dict()
    return {str(cause): int(count) for cause, count in sorted(faults.items())}


def _facts(found: pd.DataFrame, num_computed: int, stored_bytes: int) -> ModalityFacts:
    return ModalityFacts(
        num_present=int((found["row"] != NO_ROW).sum()),
        faults=_causes(found),
        num_cut=int(found["is_cut"].sum()),
        num_computed=num_computed,
        stored_mib=stored_bytes / 2**20,
    )


def content_stage(
    recipe: Recipe, directory: Path, catalogue: str, session: RaySession, reporter: Reporter
) -> StageSpec:
    """The stage of one date.

    Args:
        recipe: one with content.
        directory: where the stage publishes.
        catalogue: fingerprint of the catalogue's files.
        session: starts Ray.
        reporter: shows progress.

    Raises:
        UserError: the files of a tower are not there, or may change unseen.
    """
    config = recipe.content
    assert config is not None
    for tower in config.towers.values():
        require_commit(tower)
    files = {  # those of a hub model are what its commit, part of the settings, says
        name: tower_fingerprint(name, tower)
        for name, tower in config.towers.items()
        if not is_on_hub(tower)
    }

    reading = CatalogueReading(
        config, recipe.data, lambda: session.wait_for("content", [worker_of(config.tokens)])
    )

    def body(scratch: Path) -> StageOutput:
        facts = content(reading.take(), directory.parents[1] / STORES, scratch, reporter.advance)
        with_content = facts.num_items - facts.num_without_content
        return StageOutput(facts.num_items, with_content, facts)

    inputs = {"catalogue": catalogue, **files}
    return StageSpec(
        "content",
        directory,
        content_config(config),
        inputs,
        body,
        more_inputs=reading.more_inputs,
    )

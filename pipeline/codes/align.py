"""Item vectors from content: aligned with behaviour, or of frozen towers as they are.

Reads the text and image columns of items.parquet and, to train, pairs of items mined from the
positives of the training days. Writes

    content/             index of the items' tokens (`pipeline.content.stage`)
    pairs/               item2item, user2item (of a training only)
    encoder.safetensors  what training changed, the standardisation and a learned temperature
    item_ids.npy, vectors.npy

Every rank of a Ray Train worker group trains on its share of each batch of pairs, then encodes its
share of the items that are new or changed; the others keep their vectors as long as the encoder
stays.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from multimodal.codes.config import AlignedVectors, TowerVectors
from multimodal.codes.pair_config import User2Item
from multimodal.codes.vectors import ROWS_PER_BLOCK, BoolArray
from multimodal.content_config import ConcatFusion, ContentConfig
from multimodal.stored_content import StoredContent, StoredModality
from multimodal.token_store import NO_ROW
from pipeline.artifacts import config_hash
from pipeline.codes.align_facts import PairFacts
from pipeline.codes.id_vectors import IdSpace, id_space
from pipeline.codes.mine_pairs import mine_pairs, plan_mining
from pipeline.codes.pair_rows import write_pair_rows
from pipeline.codes.positives import PairSource
from pipeline.codes.ranker_vectors import RankerItems

ENCODER = "encoder.safetensors"
IDS, VECTORS = "item_ids.npy", "vectors.npy"
INDEX, PAIRS = "content", "pairs"
PAIR_ROWS = "pair-rows"
"""Beside them, while the stage runs."""
RESULT = "alignment.json"
PART = "part"


class AlignJob(StrictConfig):
    """What a worker needs to know; crosses to it as JSON."""

    content: ContentConfig
    training: AlignedVectors | None
    """None: encode only."""
    num_steps: int
    index: Path
    """Of the items' tokens."""
    stores: Path
    pairs: Path | None
    """Content rows of the pairs to train on (`pipeline.codes.pair_rows`)."""
    state: Path | None
    """Encoder to go on with, or to encode with."""
    standardised: bool
    """Vectors are the standardised mean tokens, without the last layer."""
    rows: Path
    """Items to encode: content rows, as a .npy file."""
    output: Path
    """Existing directory."""


def encoder_config(source: AlignedVectors | TowerVectors, content: ContentConfig) -> ContentConfig:
    """What the encoder is built from; mean tokens side by side for frozen towers."""
    if isinstance(source, TowerVectors):
        return content.model_copy(update={"fusion": ConcatFusion()})
    gradient = content.gradient.model_copy(update={"micro_batch_items": None})
    return content.model_copy(update={"gradient": gradient})


def mine(
    source: PairSource, config: AlignedVectors, ranker: RankerItems | None, scratch: Path
) -> PairFacts:
    """Write the pairs of the training days; needs an initialised Ray.

    Args:
        source: positives of the training days.
        config: which pairs.
        ranker: whose item table says which items are alike; None: positives are factorised.
        scratch: an existing directory.

    Raises:
        UserError: there are no pairs.
    """
    space = IdSpace(None, None)
    if config.user2item is not None:
        space = id_space(source, ranker, scratch, config.seed)
    user2item = config.user2item or User2Item()
    plan = plan_mining(source, config.swing, user2item, space.vectors, scratch)
    facts = mine_pairs(plan)
    if not facts.item2item_pairs + facts.user2item_pairs:
        raise UserError(
            f"codes.vectors: the {facts.num_positives} positives of {facts.first_day} .. "
            f"{facts.last_day} give no pair of items to align (item2item pairs need "
            f"{config.swing.min_common_users} common users); lower "
            "codes.vectors.swing.min_common_users, name another history in codes.vectors.history, "
            "or set codes.vectors.kind=towers"
        )
    return facts.model_copy(update={"id_space": space.kind})


def take_known_pairs(pairs: Path, index: Path, directory: Path) -> None:
    """Write the pairs whose items both have content into `directory`, which is made."""
    directory.mkdir()
    write_pair_rows(pairs, _Places.read(index).item_ids_N, directory)


def changed_rows(index: Path, earlier: Path | None) -> Int64Array:
    """Content rows of items without a vector in `earlier`, or whose content changed since."""
    now = _Places.read(index)
    if earlier is None:
        return np.flatnonzero(now.has_content)
    return np.flatnonzero(now.has_content & ~now.same_in(_Places.read(earlier / INDEX)))


def merge_vectors(job: AlignJob, earlier: Path | None) -> tuple[int, int]:
    """Write ids and vectors of all items with content, from the workers' parts and `earlier`.

    No more than a part of them is in memory.

    Returns:
        The number of items with a vector, and of those without content.
    """
    now = _Places.read(job.index)
    ids, rows = now.item_ids_N, np.load(job.rows)
    parts = sorted(job.output.glob(f"{PART}-*.npy"))
    new_ND = [np.load(part, mmap_mode="r") for part in parts]
    kept = np.flatnonzero(now.has_content)
    np.save(job.output / IDS, ids[kept])
    shape = (len(kept), new_ND[0].shape[1])
    vectors_ND = open_memmap(job.output / VECTORS, "w+", np.float32, shape)
    ends = np.cumsum([len(part_BD) for part_BD in new_ND])
    for place_B, part_BD in zip(
        np.split(np.searchsorted(kept, rows), ends[:-1]), new_ND, strict=True
    ):
        vectors_ND[place_B] = part_BD
    if earlier is not None:
        old_ids, old_ND = np.load(earlier / IDS), np.load(earlier / VECTORS, mmap_mode="r")
        others = np.flatnonzero(~np.isin(kept, rows))
        for place_B in np.split(others, range(ROWS_PER_BLOCK, len(others), ROWS_PER_BLOCK)):
            vectors_ND[place_B] = old_ND[np.searchsorted(old_ids, ids[kept[place_B]])]
    vectors_ND.flush()
    for part in parts:
        part.unlink()
    return len(kept), len(ids) - len(kept)


@dataclass(frozen=True)
class _Places:
    """Where the tokens of all items of an index lie."""

    item_ids_N: Int64Array
    """Ascending."""
    modalities: dict[str, StoredModality]
    table: pa.Table

    @classmethod
    def read(cls, index: Path) -> "_Places":
        described = StoredContent.model_validate_json((index / "content.json").read_text())
        columns = [f"{name}_{what}" for name in described.modalities for what in ("part", "row")]
        table = pq.read_table(index / "content.parquet", columns=["item_id", *columns])
        return cls(table["item_id"].to_numpy(), described.modalities, table)

    @property
    def has_content(self) -> BoolArray:
        """Items with tokens of any modality."""
        found_N = np.zeros(len(self.item_ids_N), np.bool_)
        for name in self.modalities:
            found_N |= self._column(name, "row") != NO_ROW
        return found_N

    def same_in(self, other: "_Places") -> BoolArray:
        """Items whose tokens are the same ones in another index, or absent in both."""
        same_N = np.zeros(len(self.item_ids_N), np.bool_)
        if [*self.modalities] != [*other.modalities]:
            return same_N
        _, here, there = np.intersect1d(self.item_ids_N, other.item_ids_N, return_indices=True)
        same = np.ones(len(here), np.bool_)
        for name in self.modalities:
            row, other_row = self._column(name, "row")[here], other._column(name, "row")[there]
            known = {part: number for number, part in enumerate(self._parts(name))}
            numbers = np.array([known.get(part, -2) for part in other._parts(name)] + [NO_ROW])
            part = numbers[other._column(name, "part")[there]]
            is_same_part = (self._column(name, "part")[here] == part) | (row == NO_ROW)
            same &= (row == other_row) & is_same_part
        same_N[here] = same
        return same_N

    def _column(self, name: str, what: str) -> Int64Array:
        return np.asarray(self.table[f"{name}_{what}"].to_numpy())

    def _parts(self, name: str) -> list[tuple[str, str]]:
        stored = self.modalities[name]
        return [(stored.store, part) for part in stored.parts]


def same_towers(index: Path, other: Path) -> bool:
    """Whether the tokens of two indexes are of equal towers: an encoder fits no others."""
    found, wanted = (
        StoredContent.model_validate_json((path / "content.json").read_text()).modalities
        for path in (index, other)
    )
    return {n: m.fingerprint for n, m in found.items()} == {
        n: m.fingerprint for n, m in wanted.items()
    }


def encoder_identity(state: Path, content: ContentConfig, index: Path) -> str:
    """Equal for encoders that make equal vectors of equal content."""
    described = StoredContent.model_validate_json((index / "content.json").read_text())
    towers = {name: stored.fingerprint for name, stored in described.modalities.items()}
    digest = hashlib.sha256(config_hash({"towers": towers, "dim": content.dim}).encode())
    digest.update(state.read_bytes())
    return digest.hexdigest()[:16]

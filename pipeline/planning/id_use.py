"""Which ids samples hold, by feature, in bounded memory.

Join writes what it saw as ids.arrow: feature, id, lookups. Up to `MAX_IDS` distinct ids a feature
all of them are there, with the exact number of their lookups. Beyond that a sample is: the ids
whose hash begins with `level` zero bits, one of 2**level. The hash decides and not the row, so
samples of files merge into the sample of all files, and an id counts once however often it occurs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from embedding.config import StrictConfig
from embedding.raw_ids import Int64Array, mix64

MAX_IDS = 1 << 13
"""An estimated number of distinct ids is off by 1.6% (one standard deviation) at most."""
FILE = "ids.arrow"


class IdFacts(StrictConfig):
    """Lookups of one feature."""

    lookups: int
    """Ids looked up, missing ones left out."""
    missing: int
    level: int
    """0: every distinct id was counted; else one of 2**level was."""
    distinct: int
    """Distinct ids; an estimate where `level` is above 0."""


@dataclass(frozen=True)
class IdUse:
    """Distinct ids with their lookups: all (`level` 0), or one of 2**level."""

    ids: Int64Array
    """Ascending."""
    id_lookups: Int64Array
    """Of each of `ids`."""
    level: int = 0
    lookups: int = 0
    """Of all ids, those outside the sample included."""
    missing: int = 0

    @property
    def distinct(self) -> int:
        """Distinct ids; an estimate where `level` is above 0."""
        return len(self.ids) << self.level

    @property
    def facts(self) -> IdFacts:
        """Without the ids."""
        return IdFacts(
            lookups=self.lookups, missing=self.missing, level=self.level, distinct=self.distinct
        )


def use_of(raw_ids: Int64Array) -> IdUse:
    """Count the ids of a column; those below zero are missing."""
    ids, counts = _value_counts(raw_ids)
    known = ids >= 0
    lookups = int(counts[known].sum())
    return _thinned(
        ids[known], counts[known], level=0, lookups=lookups, missing=len(raw_ids) - lookups
    )


def merge_uses(uses: Iterable[IdUse]) -> IdUse:
    """The use of all columns, files or features together."""
    parts = list(uses)
    if not parts:
        return IdUse(np.empty(0, np.int64), np.empty(0, np.int64))
    codes, ids = pd.factorize(np.concatenate([part.ids for part in parts]))
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, codes, np.concatenate([part.id_lookups for part in parts]))
    return _thinned(
        ids,
        counts,
        level=max(part.level for part in parts),
        lookups=sum(part.lookups for part in parts),
        missing=sum(part.missing for part in parts),
    )


def _value_counts(raw_ids: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Distinct values and how often each occurs."""
    lowest, highest = (int(raw_ids.min()), int(raw_ids.max())) if len(raw_ids) else (0, -1)
    if highest - lowest < max(len(raw_ids), MAX_IDS):  # a fifth of the time that hashing takes
        counts = np.bincount(raw_ids - lowest)
        present = np.flatnonzero(counts)
        return present + lowest, counts[present]
    counted = pc.value_counts(pa.array(raw_ids))
    values, counts = (counted.field(name).to_numpy() for name in ("values", "counts"))
    return np.asarray(values), np.asarray(counts)


def _thinned(
    ids: Int64Array, counts: Int64Array, *, level: int, lookups: int, missing: int
) -> IdUse:
    """At least at `level`, and further until the ids are few enough."""
    mixed = mix64(np.ascontiguousarray(ids))
    keep = np.ones(len(ids), np.bool_) if level == 0 else mixed >> np.uint64(64 - level) == 0
    while int(keep.sum()) > MAX_IDS:
        level += 1
        keep = mixed >> np.uint64(64 - level) == 0
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(ids[kept])]
    return IdUse(ids[kept], counts[kept], level, lookups, missing)


def write_uses(uses: Mapping[str, IdUse], path: Path) -> None:
    """Write the ids of all features; what `IdUse.facts` says is not in the file."""
    lengths = np.array([len(use.ids) for use in uses.values()], np.int64)
    names = pa.DictionaryArray.from_arrays(
        pa.array(np.repeat(np.arange(len(uses), dtype=np.int32), lengths)),
        pa.array(list(uses), pa.string()),
    )
    empty = [np.empty(0, np.int64)]
    table = pa.table(
        {
            "feature": names,
            "id": np.concatenate([use.ids for use in uses.values()] or empty),
            "lookups": np.concatenate([use.id_lookups for use in uses.values()] or empty),
        }
    )
    feather.write_feather(table, str(path), compression="uncompressed")


def read_uses(path: Path, facts: Mapping[str, IdFacts]) -> dict[str, IdUse]:
    """The uses that `write_uses` wrote, and their facts."""
    table = feather.read_table(str(path))
    features = table["feature"].combine_chunks()
    # Written feature after feature.
    bounds = np.searchsorted(features.indices.to_numpy(), np.arange(len(features.dictionary) + 1))
    ids, lookups = table["id"].to_numpy(), table["lookups"].to_numpy()
    found = {}
    for index, name in enumerate(features.dictionary.to_pylist()):
        at, fact = slice(bounds[index], bounds[index + 1]), facts[name]
        found[name] = IdUse(ids[at], lookups[at], fact.level, fact.lookups, fact.missing)
    return found

"""What the report shows of content itself: nearest neighbours as picture strips, and maps.

Everything is shown before and after training, for content vectors and for ID embeddings.

Shapes: N items shown on the maps, D columns of a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.raw_ids import Int64Array, is_id_type, to_raw_ids
from multimodal.codes.vectors import FloatArray
from multimodal.content_config import ContentConfig
from multimodal.content_report import (
    likeness,
    nearest_neighbours,
    spread_items,
    two_dimensional_map,
)
from pipeline.content.tasks import Catalogue
from pipeline.reports import charts
from pipeline.reports.item_cards import item_cards
from pipeline.samples.contract import open_parquet

NUM_STRIPS = 5
NUM_NEIGHBOURS = 6
MAX_KINDS = 64
"""A column with more distinct values is no kind of item."""

_ITEMS_PER_KIND = 3
"""A column with fewer items a value tells items apart instead of sorting them."""
_LEGEND_KINDS = 5
_OTHER = "other"


@dataclass(frozen=True)
class VectorSet:
    """Vectors of the same items at one moment."""

    title: str
    """Such as `content, after training`."""
    vectors_ND: FloatArray


def content_pictures(
    config: ContentConfig, root: Path, item_ids_N: Int64Array, sets: Sequence[VectorSet]
) -> dict[str, Any]:
    """Strips and maps for the report's template; nothing of fewer than two items.

    Args:
        config: names the text and image columns.
        root: the data root.
        item_ids_N: raw ids of the items whose vectors are given.
        sets: the same items at several moments; strips are those of items that the first set tells
            apart best.
    """
    if len(item_ids_N) < 2:
        return {"strips": [], "maps": [], "kind": None}
    catalogue = Catalogue(root, {name: tower.column for name, tower in config.towers.items()})
    kinds = item_kinds(catalogue, item_ids_N)
    asked = spread_items(sets[0].vectors_ND, NUM_STRIPS)
    found = {s.title: nearest_neighbours(s.vectors_ND, asked, NUM_NEIGHBOURS) for s in sets}
    shown = np.unique(np.concatenate([asked, *(near_AK.ravel() for near_AK in found.values())]))
    cards = item_cards(catalogue, item_ids_N[shown])
    strips = [
        {
            "item": cards[int(item_ids_N[row])],
            "sets": [
                {
                    "title": title,
                    "items": [cards[int(item_ids_N[other])] for other in near_AK[at]],
                }
                for title, near_AK in found.items()
            ],
        }
        for at, row in enumerate(asked)
    ]
    maps = [
        {
            "title": s.title,
            "svg": charts.cloud(_groups(two_dimensional_map(s.vectors_ND), kinds.names_N)),
            "likeness": likeness(s.vectors_ND, pd.factorize(np.array(kinds.names_N, object))[0]),
        }
        for s in sets
    ]
    return {"strips": strips, "maps": maps, "kind": kinds.column}


# --- kinds of items ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemKinds:
    """A categorical column of the catalogue, to colour items by."""

    column: str | None
    """None: the catalogue has no such column."""
    names_N: list[str | None]


def item_kinds(catalogue: Catalogue, item_ids_N: Int64Array) -> ItemKinds:
    """The first column of items.parquet that sorts items into a few kinds."""
    content = {"item_id", *catalogue.columns.values()}
    with open_parquet(catalogue.path) as file:
        names = [
            field.name
            for field in file.schema_arrow
            if field.name not in content and is_id_type(field.type)
        ]
        column = next((name for name in names if _sorts_items(file, name)), None)
    if column is None:
        return ItemKinds(None, [None] * len(item_ids_N))
    table = pq.read_table(catalogue.path, columns=["item_id", column])
    ids = to_raw_ids(table["item_id"]).to_numpy()
    is_shown = np.isin(ids, item_ids_N)
    values = table[column].filter(pa.array(is_shown)).to_pandas().to_numpy(object)
    found = pd.Series(values, index=ids[is_shown]).reindex(item_ids_N).tolist()
    return ItemKinds(column, [None if pd.isna(v) else str(v) for v in found])


def _sorts_items(file: pq.ParquetFile, column: str) -> bool:
    """Whether a column has a few values only; read no further than shows that it has more."""
    most = min(MAX_KINDS, file.metadata.num_rows // _ITEMS_PER_KIND)
    kinds: set[Any] = set()
    for batch in file.iter_batches(columns=[column], use_threads=False):
        kinds.update(batch[column].unique().drop_null().to_pylist())
        if len(kinds) > most:
            return False
    return len(kinds) >= 2


def _groups(
    places_N2: FloatArray, names_N: Sequence[str | None]
) -> Mapping[str, list[tuple[float, float]]]:
    """Places of the most frequent kinds, and of the rest."""
    frequent = pd.Series([n for n in names_N if n is not None], dtype=object).value_counts()
    kept = list(frequent.index[:_LEGEND_KINDS])
    groups: dict[str, list[tuple[float, float]]] = {name: [] for name in [_OTHER, *kept]}
    for (x, y), name in zip(places_N2.tolist(), names_N, strict=True):
        groups[name if name is not None and name in kept else _OTHER].append((x, y))
    return {name: points for name, points in groups.items() if points}

"""Items as a page shows them: a title and a small picture of each."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from embedding.raw_ids import Int64Array, to_raw_ids
from multimodal.content_config import MAX_PIXELS
from multimodal.images import read_image
from pipeline.config import Recipe
from pipeline.content.tasks import Catalogue
from pipeline.samples.contract import open_parquet

PICTURE_PIXELS = 72
"""Of the longer side."""

_TITLE = "title"
"""Column that goes before that of the texts, where the catalogue has it."""
_TITLE_LENGTH = 40
_ROWS_AT_A_TIME = 256
"""Images of so many items are in memory."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ItemCard:
    """One item."""

    title: str
    picture: str | None
    """A data URI; None where there is no image that can be used."""


def shown_catalogue(recipe: Recipe) -> Catalogue:
    """The catalogue with the columns of text and image that towers read, those of codes first.

    A modality without a tower is its name's column, if there is one.
    """
    columns = {"text": "text", "image": "image"}
    for content in recipe.contents.values():
        columns |= {name: tower.column for name, tower in content.towers.items()}
    return Catalogue(recipe.data.root, columns)


def item_cards(catalogue: Catalogue, item_ids: Int64Array) -> dict[int, ItemCard]:
    """Cards of some items, by raw id; reads the row groups that they lie in.

    Args:
        catalogue: its columns `text` and `image` are shown, as far as the file has them.
        item_ids: raw ids.
    """
    text, image = catalogue.columns.get("text"), catalogue.columns.get("image")
    names = (_TITLE, text)
    cards = {int(item): ItemCard(f"item {item}", None) for item in item_ids}
    for raw_id, row in _rows(catalogue, [name for name in (*names, image) if name], item_ids):
        value = row.get(image) if image else None
        picture = picture_uri(value, catalogue.root) if value else None
        cards[raw_id] = ItemCard(_title(row, names), picture)
    return cards


def item_names(catalogue: Catalogue, item_ids: Int64Array) -> dict[int, tuple[str, str]]:
    """Id as the catalogue writes it, and title, of the items that it has, by raw id.

    Args:
        catalogue: titles come from its column `text`, where there is no better one.
        item_ids: raw ids.
    """
    names = [name for name in (_TITLE, catalogue.columns.get("text")) if name]
    return {
        raw_id: (str(row["item_id"]), _title(row, names))
        for raw_id, row in _rows(catalogue, names, item_ids)
    }


def _title(row: Row, names: Iterable[str | None]) -> str:
    titles = (" ".join(str(row[name]).split()) for name in names if name and row.get(name))
    return _shortened(next((title for title in titles if title), f"item {row['item_id']}"))


def _rows(
    catalogue: Catalogue, columns: list[str], item_ids: Int64Array
) -> Iterator[tuple[int, Row]]:
    """Raw id and columns of these items, a bounded number of rows at a time."""
    known = set(pq.read_schema(catalogue.path).names)
    columns = ["item_id", *(name for name in dict.fromkeys(columns) if name in known)]
    with open_parquet(catalogue.path) as file:
        for group in range(file.num_row_groups):
            ids = to_raw_ids(file.read_row_group(group, ["item_id"])["item_id"]).to_numpy()
            rows, start = np.flatnonzero(np.isin(ids, item_ids)), 0
            if not len(rows):
                continue
            for batch in file.iter_batches(_ROWS_AT_A_TIME, [group], columns):
                own = rows[(rows >= start) & (rows < start + len(batch))]
                yield from zip(ids[own].tolist(), batch.take(own - start).to_pylist(), strict=True)
                start += len(batch)


def _shortened(text: str) -> str:
    return text if len(text) <= _TITLE_LENGTH else f"{text[: _TITLE_LENGTH - 3].rstrip()}..."


def picture_uri(value: bytes | str, root: Path) -> str | None:
    """A small JPEG that a page can hold; None for an image that cannot be used.

    What cannot be used is counted where content is encoded; here only the picture is left out.
    """
    image = read_image(value, root, PICTURE_PIXELS, MAX_PIXELS)
    if isinstance(image, str):
        return None
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

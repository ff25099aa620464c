"""Strips and maps of the report show the items that the vectors say."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from multimodal.content_config import ContentConfig
from pipeline.content import pictures
from pipeline.content.pictures import NUM_NEIGHBOURS, VectorSet, content_pictures, item_kinds
from pipeline.content.tasks import Catalogue
from pipeline.reports.item_cards import ItemCard

NUM_ITEMS = 40


def colour(item: int) -> tuple[int, int, int]:
    return (6 * item, 255 - 6 * item, 100)


def picture(item: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 24), colour(item)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Items 0 .. 39, a quarter of each kind; item 3 has no picture."""
    items = range(NUM_ITEMS)
    table = pa.table(
        {
            "item_id": pa.array(items, pa.int64()),
            "title": [f"Film {i}" for i in items],
            "kind": [f"kind {i % 4}" for i in items],
            "text": [f"The plot of film {i}" for i in items],
            "image": pa.array([None if i == 3 else picture(i) for i in items], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=9)
    return tmp_path


def by_kind() -> np.ndarray:
    """Vectors that have the kind as their direction."""
    noise = np.random.default_rng(0).normal(size=(NUM_ITEMS, 8)) * 0.05
    vectors: np.ndarray = np.eye(8, dtype=np.float32)[np.arange(NUM_ITEMS) % 4] + noise
    return vectors.astype(np.float32)


def shown(root: Path) -> dict[str, Any]:
    random = np.random.default_rng(1).normal(size=(NUM_ITEMS, 8)).astype(np.float32)
    sets = [VectorSet("after", by_kind()), VectorSet("before", random)]
    config = ContentConfig.model_validate({"text": {}, "image": {}})
    return content_pictures(config, root, np.arange(NUM_ITEMS), sets)


def number(card: ItemCard) -> int:
    return int(card.title.removeprefix("Film "))


def test_strips_show_neighbours_with_titles_and_pictures(root: Path) -> None:
    for strip in shown(root)["strips"]:
        kind = number(strip["item"]) % 4
        after, before = strip["sets"]
        assert [len(part["items"]) for part in strip["sets"]] == [NUM_NEIGHBOURS] * 2
        assert {number(card) % 4 for card in after["items"]} == {kind}
        assert {number(card) % 4 for card in before["items"]} != {kind}
        for card in [strip["item"], *after["items"]]:
            if number(card) == 3:
                assert card.picture is None
                continue
            assert card.picture
            data = base64.b64decode(card.picture.partition("base64,")[2])
            pixel = np.asarray(Image.open(io.BytesIO(data)))[12, 8]
            np.testing.assert_allclose(pixel, colour(number(card)), atol=12)


def test_maps_are_coloured_by_the_catalogues_kinds(root: Path) -> None:
    page = shown(root)
    assert page["kind"] == "kind"
    after, before = page["maps"]
    # Of ten neighbours nine can be of the item's kind: there are ten items of each.
    assert after["likeness"] == pytest.approx(0.9)
    assert before["likeness"] < 0.5
    for kind in range(4):
        assert f"kind {kind}" in after["svg"]


def test_columns_that_sort_no_items_are_not_read_to_their_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(pictures, "MAX_KINDS", 5)
    batches, whole = pq.ParquetFile.iter_batches, pq.read_table

    def iter_batches(file: pq.ParquetFile, *, columns: list[str], **_: Any) -> Iterator[Any]:
        for batch in batches(file, 9, columns=columns):
            read.extend(columns * len(batch))
            yield batch

    def read_table(path: Path, *, columns: list[str]) -> pa.Table:
        read.extend(columns * NUM_ITEMS)
        return whole(path, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    monkeypatch.setattr(pictures.pq, "read_table", read_table)
    catalogue = Catalogue(root, {"text": "text", "image": "image"})

    found = item_kinds(catalogue, np.array([7, 99, 2]))

    assert (found.column, found.names_N) == ("kind", ["kind 3", None, "kind 2"])
    assert read.count("title") == 9, "of the first row group"
    assert read.count("kind") == 2 * NUM_ITEMS


def test_a_catalogue_without_kinds_or_titles_is_shown_too(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["a", "b", "c"], "text": ["x " * 50, None, "short"]})
    pq.write_table(items, tmp_path / "items.parquet")
    from embedding.raw_ids import to_raw_ids

    ids = to_raw_ids(items["item_id"]).to_numpy()
    vectors = np.eye(3, dtype=np.float32)
    config = ContentConfig.model_validate({"text": {}})
    page = content_pictures(config, tmp_path, ids, [VectorSet("now", vectors)])
    assert page["kind"] is None
    titles = {strip["item"].title for strip in page["strips"]}
    assert titles == {"item b", "short", "x x x x x x x x x x x x x x x x x x x..."}

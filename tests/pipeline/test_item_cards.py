"""Titles and pictures of items, from whatever the catalogue has."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedding.raw_ids import to_raw_ids
from pipeline.content.tasks import Catalogue
from pipeline.reports.item_cards import PICTURE_PIXELS, ItemCard, item_cards, picture_uri

COLUMNS = {"text": "plot", "image": "poster"}


def catalogue(root: Path, **columns: Any) -> Catalogue:
    pq.write_table(pa.table(columns), root / "items.parquet", row_group_size=3)
    return Catalogue(root, COLUMNS)


def png(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(uri: str | None) -> Image.Image:
    assert uri is not None
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_title_goes_before_the_text_and_the_text_before_the_id(tmp_path: Path) -> None:
    shown = catalogue(
        tmp_path,
        item_id=["a", "b", "c", "d", "e"],
        title=["A", " ", None, None, "a very long title that does not fit in here"],
        plot=["one", "two\n words", None, "four", "five"],
    )
    ids = to_raw_ids(pa.array(["e", "a", "b", "c"])).to_numpy()

    cards = item_cards(shown, np.append(ids, 123))

    assert [cards[item].title for item in ids.tolist()] == [
        *("a very long title that does not fit i...", "A", "two words", "item c")
    ]
    assert cards[123] == ItemCard("item 123", None), "not in the catalogue"
    assert len(cards) == 5


def test_columns_that_are_not_there_are_not_shown(tmp_path: Path) -> None:
    shown = catalogue(tmp_path, item_id=[7, 8])
    assert item_cards(shown, np.array([8])) == {8: ItemCard("item 8", None)}


def test_pictures_of_bytes_and_of_paths_keep_their_shape(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png(300, 100))
    by_path = catalogue(tmp_path, item_id=[1, 2], poster=["wide.png", "gone.png"])
    cards = item_cards(by_path, np.array([1, 2]))
    assert opened(cards[1].picture).size == (PICTURE_PIXELS, PICTURE_PIXELS // 3)
    assert cards[2].picture is None

    by_bytes = catalogue(tmp_path, item_id=[1, 2, 3], poster=[png(10, 20), b"no image", None])
    cards = item_cards(by_bytes, np.array([1, 2, 3]))
    assert opened(cards[1].picture).size == (10, 20)
    assert cards[2].picture is None
    assert cards[3].picture is None


def test_a_turned_photograph_is_shown_upright() -> None:
    photograph, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by a quarter
    buffer = io.BytesIO()
    photograph.save(buffer, "JPEG", exif=exif)
    assert opened(picture_uri(buffer.getvalue(), Path())).size == (20, 40)


def test_images_of_other_row_groups_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [png(8, 8, (10 * i, 0, 0)) for i in range(9)]
    shown = catalogue(tmp_path, item_id=list(range(9)), poster=pictures)
    read: list[list[int]] = []
    iterate = pq.ParquetFile.iter_batches

    def watched(file: Any, rows: int, groups: list[int], columns: list[str]) -> Any:
        read.append(groups)
        return iterate(file, rows, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    monkeypatch.setattr("pipeline.reports.item_cards._ROWS_AT_A_TIME", 2)

    cards = item_cards(shown, np.array([4, 5]))

    assert read == [[1]]
    for item in (4, 5):
        pixel = opened(cards[item].picture).getpixel((4, 4))
        assert isinstance(pixel, tuple)
        assert abs(pixel[0] - 10 * item) < 6

"""The code browser of the report against the codes it shows."""

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedding.raw_ids import to_raw_ids
from pipeline.code_features import NearItems, codes_table
from pipeline.code_report import NUM_FIRST_CODES, NUM_ITEMS, NUM_PREFIXES, browse


def catalogue(root: Path, num_items: int, *, titles: bool) -> None:
    picture = io.BytesIO()
    Image.new("CMYK", (300, 200), (0, 255, 0, 0)).save(picture, "JPEG")
    images = [picture.getvalue() if i % 2 else b"no picture" for i in range(num_items)]
    columns = {"item_id": [f"i{i}" for i in range(num_items)], "image": images}
    if titles:
        columns["title"] = [f"Film {i}" for i in range(num_items)]
    else:
        columns["text"] = [None if i == 0 else f"{i} b c d e f g h" for i in range(num_items)]
    pq.write_table(pa.table(columns), root / "items.parquet", row_group_size=7)


def test_the_most_frequent_codes_are_shown_with_their_items(tmp_path: Path) -> None:
    num_items = 200
    catalogue(tmp_path, num_items, titles=True)
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.25, (num_items, 2)) - 1, 9).astype(np.int32)
    ids = to_raw_ids(pa.array([f"i{i}" for i in range(num_items)])).to_numpy()
    pq.write_table(codes_table(ids, codes), tmp_path / "codes.parquet")

    found = browse(tmp_path / "codes.parquet", tmp_path)

    firsts = [int(code.prefix.split("-")[0]) for code in found]
    frequent = np.argsort(-np.bincount(codes[:, 0]), kind="stable")[:NUM_FIRST_CODES]
    assert list(dict.fromkeys(firsts)) == frequent.tolist()
    for code in found:
        first, second = map(int, code.prefix.split("-"))
        members = np.flatnonzero((codes == (first, second)).all(axis=1))
        assert code.num_items == len(members)
        expected = [f"Film {i}" for i in members[:NUM_ITEMS]]
        assert [item.title for item in code.shown] == expected
        for item, row in zip(code.shown, members, strict=False):
            assert (item.picture is not None) == (row % 2 == 1)
    assert len(found) <= NUM_FIRST_CODES * NUM_PREFIXES
    picture = next(item.picture for code in found for item in code.shown if item.picture)
    kind, data = picture.split(",")
    assert kind == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 72


def test_items_without_a_title_show_their_text_or_id(tmp_path: Path) -> None:
    catalogue(tmp_path, 3, titles=False)
    ids = to_raw_ids(pa.array(["i0", "i1", "i2"])).to_numpy()
    codes = np.zeros((3, 1), np.int32)
    pq.write_table(codes_table(ids, codes), tmp_path / "codes.parquet")
    (code,) = browse(tmp_path / "codes.parquet", tmp_path)
    assert [item.title for item in code.shown] == ["item i0", "1 b c d e f g h", "2 b c d e f g h"]


def test_vq_codes_alone_have_no_browser(tmp_path: Path) -> None:
    none = np.empty((2, 0), np.int32)
    near = np.array([[0, 1], [1, 0]], np.int32)
    pq.write_table(
        codes_table(np.arange(2), none, None, NearItems(np.arange(2), near)),
        tmp_path / "codes.parquet",
    )
    assert browse(tmp_path / "codes.parquet", tmp_path) == []

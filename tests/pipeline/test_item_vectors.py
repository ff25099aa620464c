"""Vectors that come with the catalogue, and every way in which they can be wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedding.errors import UserError
from embedding.raw_ids import to_raw_ids
from multimodal.codes.config import ColumnVectors
from multimodal.codes.vectors import ROWS_PER_BLOCK
from multimodal.content_config import ContentConfig, TextTower
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from multimodal.token_store import NO_ROW
from pipeline.codes.align import AlignJob, changed_rows, merge_vectors
from pipeline.codes.item_vectors import ItemVectors, read_column_vectors

SOURCE = ColumnVectors(column="vec", encoder="v7")


def write(root: Path, vectors: Any, ids: Any = (3, 1, 2)) -> None:
    table = pa.table({"item_id": pa.array(ids), "vec": vectors})
    pq.write_table(table, root / "items.parquet")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)]
)
def test_vectors_come_in_the_order_of_their_ids(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path, pa.array([[1.0, 2.0], None, [3.0, 4.5]], kind))

    found = read_column_vectors(tmp_path, SOURCE)

    assert found.item_ids_N.tolist() == [2, 3]
    np.testing.assert_array_equal(found.vectors_ND, np.array([[3, 4.5], [1, 2]], np.float32))
    assert found.num_without == 1
    assert found.encoder == "column:vec/v7/2"


def test_vectors_of_several_row_groups_come_together(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
    ids = np.random.default_rng(1).permutation(11)
    table = pa.table({"item_id": ids, "vec": pa.array(list(x), pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=4)
    found = read_column_vectors(tmp_path, SOURCE)
    assert found.item_ids_N.tolist() == [*range(11)]
    np.testing.assert_array_equal(found.vectors_ND[ids], x)


def test_ids_may_be_strings(tmp_path: Path) -> None:
    ids = pa.array(["b", "a"])
    write(tmp_path, pa.array([[1.0], [2.0]]), ids)
    found = read_column_vectors(tmp_path, SOURCE)
    order = np.argsort(to_raw_ids(ids).to_numpy())
    assert found.vectors_ND[:, 0].tolist() == np.array([1.0, 2.0])[order].tolist()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (pa.array(["a", "b", "c"]), r"'vec' has type string but must hold .* list<float32>"),
        (pa.array([[1], [2], [3]]), r"'vec' has type list<.*int64> but must hold"),
        (
            pa.array([None] * 3, pa.list_(pa.float32())),
            r"null for all 3 items; write their vectors",
        ),
        (pa.array([[1.0], [1.0, 2.0], [3.0]]), r"of item_id 1 does not have 1 elements .*1 items"),
        (pa.array([[1.0], [2.0], [float("nan")]]), r"of item_id 2 holds NaN, null or infinity"),
        (pa.array([[1.0], [float("inf")], [None]]), r"of item_id 1 holds NaN.*\(2 items in all\)"),
    ],
)
def test_wrong_vectors_are_refused_with_the_item(
    tmp_path: Path, vectors: pa.Array, message: str
) -> None:
    write(tmp_path, vectors)
    with pytest.raises(UserError, match=message):
        read_column_vectors(tmp_path, SOURCE)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write(tmp_path, pa.array([[1.0], [2.0], [3.0]]))
    with pytest.raises(UserError, match=r"lacks the columns \['vector'\]"):
        read_column_vectors(tmp_path, ColumnVectors())


def test_seen_vectors_of_a_file_are_copied_into_one_that_goes_with_them(tmp_path: Path) -> None:
    num_items = 2 * ROWS_PER_BLOCK + 7
    vectors_ND = np.random.default_rng(1).standard_normal((num_items, 2)).astype(np.float32)
    seen_N = np.arange(num_items) % 3 > 0
    path = tmp_path / "vectors.npy"
    np.save(path, vectors_ND)
    mapped_ND = np.load(path, mmap_mode="c")
    ids = np.arange(num_items)
    items = ItemVectors(ids, mapped_ND, "e", "d", "d", seen_N=seen_N, file=path)

    seen = items.seen

    assert isinstance(seen.vectors_ND, np.memmap)
    np.testing.assert_array_equal(seen.vectors_ND, vectors_ND[seen_N])
    np.testing.assert_array_equal(seen.item_ids_N, ids[seen_N])
    assert [file.name for file in tmp_path.iterdir()] == ["vectors.npy"]


Tokens = dict[int, tuple[str, int] | None]
"""By item: part and row; None where there is none."""


def write_places(folder: Path, modalities: dict[str, tuple[str, Tokens]]) -> Path:
    """An index of the items; modalities by name, with their store."""
    ids = np.array(sorted(next(iter(modalities.values()))[1]))
    stored, places = {}, {}
    for name, (store, tokens) in modalities.items():
        parts = sorted({at[0] for at in tokens.values() if at is not None})
        found = [tokens[item] for item in ids.tolist()]
        part_N = np.array([NO_ROW if at is None else parts.index(at[0]) for at in found])
        row_N = np.array([NO_ROW if at is None else at[1] for at in found])
        stored[name] = StoredModality(
            store=store, fingerprint=store, precision="float16", hidden_size=2, parts=tuple(parts)
        )
        places[name] = Places(part_N, row_N, row_N)
    folder.mkdir(parents=True)
    write_index(folder, ids, StoredContent(num_items=len(ids), modalities=stored), places)
    return folder


def test_items_whose_tokens_are_others_are_encoded_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)

    def tokens(items: range, parts: str) -> Tokens:
        return {
            i: None if rng.random() < 0.3 else (str(rng.choice([*parts])), int(rng.integers(2)))
            for i in items
        }

    text, image = tokens(range(60), "abc"), tokens(range(60), "de")
    later = {
        "text": ("t", {**tokens(range(5, 70), "bcx"), **{i: text[i] for i in range(9, 40)}}),
        "image": ("i", {**tokens(range(5, 70), "de"), **{i: image[i] for i in range(20, 50)}}),
    }
    before, now = tmp_path / "before", tmp_path / "now"
    write_places(before / "content", {"text": ("t", text), "image": ("i", image)})
    write_places(now, later)

    expected, new = [], []
    for row, item in enumerate(range(5, 70)):
        here = [tokens[item] for _, tokens in later.values()]
        if any(at is not None for at in here):
            new.append(row)
            if item >= 60 or here != [text[item], image[item]]:
                expected.append(row)
    assert 10 < len(expected) < len(new) - 10
    assert changed_rows(now, before).tolist() == expected
    assert changed_rows(now, None).tolist() == new
    others = {"text": ("u", later["text"][1]), "image": later["image"]}
    write_places(tmp_path / "other" / "content", others)  # another store of texts
    texts = [row for row in new if later["text"][1][row + 5] is not None]
    assert changed_rows(now, tmp_path / "other").tolist() == texts
    write_places(tmp_path / "fewer" / "content", {"text": later["text"]})
    assert changed_rows(now, tmp_path / "fewer").tolist() == new


def test_vectors_of_ranks_and_of_the_day_before_are_put_together(tmp_path: Path) -> None:
    """Items 0 .. 8; 3 lacks content, 1, 5 and 7 are encoded by two ranks, the others kept."""
    now, before = tmp_path / "now", tmp_path / "before"
    (now / "content").mkdir(parents=True)
    before.mkdir()
    row_N = np.where(np.arange(9) == 3, NO_ROW, np.arange(9))
    text = StoredModality(
        store="s", fingerprint="f", precision="float16", hidden_size=2, parts=("p",)
    )
    write_index(
        now / "content",
        np.arange(9),
        StoredContent(num_items=9, modalities={"text": text}),
        {"text": Places(np.where(row_N == NO_ROW, NO_ROW, 0), row_N, row_N)},
    )
    np.save(now / "rows.npy", [1, 5, 7])
    np.save(now / "part-00000.npy", np.array([[1, 10], [5, 50]], np.float32))
    np.save(now / "part-00001.npy", np.array([[7, 70]], np.float32))
    old = [0, 2, 3, 4, 6, 7, 8]  # item 3 had content then
    np.save(before / "item_ids.npy", old)
    np.save(before / "vectors.npy", np.array([[i, -i] for i in old], np.float32))
    job = AlignJob(
        content=ContentConfig(text=TextTower()),
        training=None,
        num_steps=0,
        index=now / "content",
        stores=tmp_path,
        pairs=None,
        state=None,
        standardised=False,
        rows=now / "rows.npy",
        output=now,
    )

    assert merge_vectors(job, before) == (8, 1)

    assert np.load(now / "item_ids.npy").tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    merged = np.load(now / "vectors.npy")
    kept = [[i, -i] for i in (0, 2, 4, 6, 8)]
    assert sorted(merged.tolist()) == sorted([*kept, [1, 10], [5, 50], [7, 70]])
    assert merged[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert merged.dtype == np.float32
    assert not [*now.glob("part-*")]

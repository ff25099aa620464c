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
from pipeline.codes.item_vectors import read_column_vectors

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

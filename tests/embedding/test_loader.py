"""Batches against a naive row-by-row reading of the same files."""

import errno
import json
import threading
import time
from collections import Counter
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding.batch import RankingBatch
from embedding.config import Identity, TableConfig
from embedding.epochs import Leg, Position
from embedding.errors import UserError
from embedding.feature_schema import (
    DenseFeature,
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.hashing import rows_of
from embedding.loader import SampleFiles, SampleLoader
from embedding.prefetch import Prefetched

TASKS = ("click", "like")
SCHEMA = FeatureSchema(
    tables=(
        TableConfig(name="user", num_embeddings=50),
        TableConfig(name="item", num_embeddings=40),
        TableConfig(name="tag", num_embeddings=9, ids=Identity()),
        TableConfig(name="gap", num_embeddings=9, ids=Identity()),
    ),
    sparse=(
        SparseFeature(name="user_id", table="user"),
        SparseFeature(name="tags", table="tag"),
        SparseFeature(name="item_id", table="item"),
        SparseFeature(name="other", table="user"),
    ),
    dense=(DenseFeature(name="price"), DenseFeature(name="age")),
    histories=(HistoryConfig(name="past"),),
    sequences=(
        SequenceFeature(name="past_item", history="past", table="item", target="item_id"),
        SequenceFeature(name="past_gap", history="past", table="gap", source="gap"),
    ),
)
SINGLE = FeatureSchema(
    tables=SCHEMA.tables[:1],
    sparse=(SCHEMA.sparse[0], SCHEMA.sparse[3]),
    dense=SCHEMA.dense,
)


def _raw_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        length = int(rng.integers(0, 5))
        rows.append(
            {
                "key:request_id": seed * 100_000 + i,
                "key:user_id": int(rng.integers(100)),
                "key:item_id": int(rng.integers(100)),
                "key:timestamp": 10**12 + i,
                "label:click": float(rng.integers(2)),
                "label:like": None if rng.random() < 0.4 else float(rng.integers(2)),
                "dense:price": float(np.float32(rng.normal())),
                "dense:age": float(np.float32(rng.normal())),
                "sparse:user_id": int(rng.integers(2**62)),
                "sparse:item_id": -1 if rng.random() < 0.2 else int(rng.integers(2**62)),
                "sparse:other": int(rng.integers(2**62)),
                "sparse:tags": None
                if rng.random() < 0.1
                else rng.integers(-1, 12, rng.integers(0, 4)).tolist(),
                "sequence:past_item": rng.integers(0, 2**62, length).tolist(),
                "sequence:past_gap": rng.integers(0, 8, length).tolist(),
            }
        )
    return rows


ARROW = pa.schema(
    [(f"key:{k}", pa.int64()) for k in ("request_id", "user_id", "item_id", "timestamp")]
    + [(f"label:{t}", pa.float32()) for t in TASKS]
    + [(f"dense:{d}", pa.float32()) for d in ("price", "age")]
    + [(f"sparse:{s}", pa.int64()) for s in ("user_id", "item_id", "other")]
    + [
        (n, pa.list_(pa.int64()))
        for n in ("sparse:tags", "sequence:past_item", "sequence:past_gap")
    ]
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("samples")
    paths, rows = [], []
    for seed, num_rows in enumerate((37, 1, 64)):
        part = _raw_rows(num_rows, seed)
        paths.append(folder / f"part-{seed}.parquet")
        pq.write_table(pa.Table.from_pylist(part, schema=ARROW), paths[-1], row_group_size=10)
        rows += part
    return paths, rows


def _loader(paths: list[Path], schema: FeatureSchema = SCHEMA, **kwargs: int) -> SampleLoader:
    settings = {"batch_size_per_rank": 8, **kwargs}
    return SampleLoader(SampleFiles(paths, schema, TASKS), **settings)


def _expected(row: dict[str, Any], schema: FeatureSchema) -> dict[str, Any]:
    """One row, converted by hand."""
    seen: dict[str, Any] = {
        "keys": [row[f"key:{k}"] for k in ("request_id", "user_id", "item_id", "timestamp")],
        "labels": [row[f"label:{t}"] for t in TASKS],
        "weights": [1.0 for _ in TASKS],
        "dense": [row[f"dense:{f.name}"] for f in schema.dense],
    }
    for feature in (*schema.sparse, *schema.sequences):
        prefix = "sequence" if isinstance(feature, SequenceFeature) else "sparse"
        raw = row[f"{prefix}:{feature.name}"]
        ids = raw if isinstance(raw, list) else [] if raw is None else [raw]
        rows = rows_of(torch.tensor(ids, dtype=torch.int64), schema.table(feature.table))
        seen[feature.name] = rows.tolist()
    return seen


def _seen(batch: RankingBatch) -> list[dict[str, Any]]:
    """The real rows of a batch, one by one."""
    features = {**batch.pooled.to_dict(), **batch.unpooled.to_dict()}
    rows = []
    for i in range(batch.num_rows):
        row: dict[str, Any] = {
            "keys": batch.keys_BK[i].tolist(),
            "labels": [None if isnan(label) else label for label in batch.labels_BT[i].tolist()],
            "weights": batch.weights_BT[i].tolist(),
            "dense": batch.dense_BF[i].tolist(),
        }
        for name, jagged in features.items():
            start, stop = jagged.offsets()[i : i + 2].tolist()
            row[name] = jagged.values()[start:stop].tolist()
        rows.append(row)
    return rows


@pytest.mark.parametrize("schema", [SCHEMA, SINGLE], ids=["jagged", "single"])
def test_sequential_batches_equal_a_row_by_row_reading(
    samples: tuple[list[Path], list[dict[str, Any]]], schema: FeatureSchema
) -> None:
    paths, rows = samples
    with _loader(paths, schema).sequential() as stream:
        batches = list(stream)
    assert [row for b in batches for row in _seen(b)] == [_expected(row, schema) for row in rows]
    assert {b.labels_BT.shape[0] for b in batches} == {8}
    assert len(batches) == stream.num_steps == 13
    assert stream.stats.rows == len(rows)


@pytest.mark.parametrize("schema", [SCHEMA, SINGLE], ids=["jagged", "single"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_shuffled_ranks_see_every_row_once_with_its_own_columns(
    samples: tuple[list[Path], list[dict[str, Any]]], schema: FeatureSchema, world_size: int
) -> None:
    paths, rows = samples
    seen, steps = [], set()
    for rank in range(world_size):
        with _loader(paths, schema, rank=rank, world_size=world_size).shuffled(Position()) as s:
            batches = list(s)
        seen += [row for b in batches for row in _seen(b)]
        steps.add(len(batches))
    assert len(steps) == 1
    expected = Counter(json.dumps(_expected(row, schema), sort_keys=True) for row in rows)
    assert Counter(json.dumps(row, sort_keys=True) for row in seen) == expected
    assert [r["keys"] for r in seen] != [_expected(r, schema)["keys"] for r in rows]


def test_key_order_of_the_kjts_is_the_schema_s(
    samples: tuple[list[Path], list[dict[str, Any]]],
) -> None:
    with _loader(samples[0]).sequential() as stream:
        batch = next(stream)
    assert batch.pooled.keys() == ["user_id", "tags", "other"]
    assert batch.unpooled.keys() == ["item_id", "past_item", "past_gap"]


def test_filling_rows_have_weight_zero_and_repeat_real_rows(
    samples: tuple[list[Path], list[dict[str, Any]]],
) -> None:
    with _loader(samples[0], batch_size_per_rank=64).sequential() as stream:
        last = list(stream)[-1]
    assert last.num_rows == 102 - 64
    assert last.weights_BT[last.num_rows :].eq(0).all()
    real = {tuple(key) for key in last.keys_BK[: last.num_rows].tolist()}
    assert {tuple(key) for key in last.keys_BK[last.num_rows :].tolist()} <= real
    assert len(last.pooled.lengths()) == 3 * 64


def test_a_rank_without_rows_steps_with_the_others(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    pq.write_table(pa.Table.from_pylist(_raw_rows(2, 5), schema=ARROW), path)
    batches = []
    for rank in range(4):
        with _loader([path], rank=rank, world_size=4).shuffled(Position()) as stream:
            batches += list(stream)
    assert sorted(b.num_rows for b in batches) == [0, 0, 1, 1]
    assert all(b.weights_BT[b.num_rows :].eq(0).all() for b in batches)


def test_resume_gives_the_batches_an_undisturbed_pass_would(
    samples: tuple[list[Path], list[dict[str, Any]]],
) -> None:
    loader = _loader(samples[0], rank=1, world_size=2)
    with loader.shuffled(Position()) as stream:
        whole = [_seen(batch) for batch in stream]
    leg = Leg(world_size=2, batch_size_per_rank=8, steps=3)
    with loader.shuffled(Position().after(leg)) as stream:
        assert [_seen(batch) for batch in stream] == whole[3:]


def test_a_truncated_file_is_a_user_error(
    samples: tuple[list[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(samples[0][0].read_bytes()[:-200])
    with pytest.raises(UserError, match=r"damaged\.parquet.*truncated"):
        _loader([damaged])


def test_damage_inside_a_file_reaches_the_consumer_and_ends_the_threads(
    samples: tuple[list[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.parquet"
    content = bytearray(samples[0][2].read_bytes())
    content[200:3000] = bytes(2800)
    damaged.write_bytes(content)
    before = threading.active_count()
    with _loader([damaged]).sequential() as stream, pytest.raises(UserError, match="damaged"):
        list(stream)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EIO, OSError),
        (errno.ESTALE, OSError),
        (errno.ETIMEDOUT, TimeoutError),
        (errno.ENOENT, UserError),
        (errno.EACCES, UserError),
        (None, UserError),
    ],
)
def test_only_what_stays_wrong_with_a_file_is_a_user_error(
    samples: tuple[list[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    number: int | None,
    expected: type[Exception],
) -> None:
    """The others end the group, which goes on from its checkpoint; pyarrow numbers them so."""
    error = OSError("Unexpected end of stream") if number is None else OSError(number, "as said")

    def fails(*_: object, **__: object) -> pa.Table:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_metadata", fails)
        with pytest.raises(expected) as opening:
            _loader(samples[0])
    loader = _loader(samples[0])
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with loader.sequential() as stream, pytest.raises(expected) as reading:
        list(stream)
    assert {type(opening.value), type(reading.value)} == {expected}


def test_single_ids_of_some_files_are_lists_of_one_where_others_hold_lists(
    samples: tuple[list[Path], list[dict[str, Any]]], tmp_path: Path
) -> None:
    single = [{**row, "sparse:tags": 3 + i} for i, row in enumerate(_raw_rows(5, 9))]
    at = ARROW.get_field_index("sparse:tags")
    schema = ARROW.set(at, pa.field("sparse:tags", pa.int64()))
    pq.write_table(pa.Table.from_pylist(single, schema=schema), tmp_path / "single.parquet")

    with _loader([tmp_path / "single.parquet", *samples[0]]).sequential() as stream:
        seen = [row for batch in stream for row in _seen(batch)]

    assert seen == [_expected(row, SCHEMA) for row in [*single, *samples[1]]]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("dense:price", None, r"part\.parquet: column 'dense:price' is missing"),
        ("sparse:user_id", pa.string(), r"'sparse:user_id' has type string but must be int64"),
        ("sequence:past_gap", pa.int64(), r"'sequence:past_gap' has type int64 .* list<int64>"),
        ("label:click", pa.int64(), r"'label:click' has type int64 but must be float"),
    ],
)
def test_a_wrong_column_is_a_user_error(
    tmp_path: Path, column: str, value: pa.DataType | None, message: str
) -> None:
    path = tmp_path / "part.parquet"
    table = pa.Table.from_pylist(_raw_rows(3, 0), schema=ARROW)
    index = table.schema.get_field_index(column)
    if value is None:
        table = table.remove_column(index)
    else:
        table = table.set_column(index, pa.field(column, value), pa.nulls(3, value))
    pq.write_table(table, path)
    with pytest.raises(UserError, match=message):
        _loader([path])


def test_a_row_has_its_weight_whether_the_label_is_there_or_not(tmp_path: Path) -> None:
    path, table = tmp_path / "part.parquet", pa.Table.from_pylist(_raw_rows(20, 0), schema=ARROW)
    weights = pa.array(np.arange(20) / 4, pa.float32())
    pq.write_table(table.append_column(f"weight:{TASKS[1]}", weights), path)
    with _loader([path]).sequential() as stream:
        batches = list(stream)
    labels = torch.cat([batch.labels_BT[: batch.num_rows, 1] for batch in batches])
    assert 0 < labels.isnan().sum() < 20
    found = torch.cat([batch.weights_BT[: batch.num_rows] for batch in batches])
    assert found.equal(torch.stack([torch.ones(20), torch.arange(20) / 4], dim=1))

    pq.write_table(table, tmp_path / "plain.parquet")
    with pytest.raises(UserError, match=f"plain.parquet: column 'weight:{TASKS[1]}' is missing"):
        _loader([path, tmp_path / "plain.parquet"])


def test_a_null_id_names_file_and_column(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    rows = _raw_rows(3, 0)
    rows[1]["sparse:user_id"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=ARROW), path)
    with (
        _loader([path]).sequential() as stream,
        pytest.raises(UserError, match=r"part\.parquet.*'sparse:user_id' holds 1 null"),
    ):
        list(stream)


def test_closing_early_ends_the_threads(
    samples: tuple[list[Path], list[dict[str, Any]]],
) -> None:
    before = threading.active_count()
    stream = _loader(samples[0], batch_size_per_rank=1).sequential()
    next(stream)
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_wait_is_measured_by_the_consumer() -> None:
    def slow() -> Any:
        for i in range(3):
            time.sleep(0.1)
            yield i

    items = Prefetched(slow, depth=2)
    assert list(items) == [0, 1, 2]
    assert 0.25 < items.wait_s < 1.0

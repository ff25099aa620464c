"""The items of a batch against a naive reading of the same rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding.config import TableConfig
from embedding.epochs import Position
from embedding.errors import UserError
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.item_columns import candidate_field, item_sequences
from embedding.items import NO_CONTENT, ItemIndex, ItemRows, ItemSource
from embedding.loader import SampleFiles, SampleLoader

NUM_ROWS = 53
SCHEMA = FeatureSchema(
    tables=(TableConfig(name="item", num_embeddings=40),),
    histories=(HistoryConfig(name="past"), HistoryConfig(name="liked")),
    sequences=(
        SequenceFeature(name="past_item", history="past", table="item", column="item_id"),
        SequenceFeature(name="liked_item", history="liked", table="item", column="item_id"),
    ),
)
STORE = torch.tensor([70, 10, 2**60 + 5, 30])  # raw id of rows 0 .. 3


def _samples(path: Path) -> list[tuple[int, list[int], list[int]]]:
    """(request, candidate, past, liked) of every row, written to `path`."""
    rng = np.random.default_rng(3)
    known = [*STORE.tolist(), 11, 2**60]  # the last two have no content
    candidates = rng.choice(known, NUM_ROWS)
    lists = [[rng.choice(known, rng.integers(0, 6)).tolist() for _ in candidates] for _ in "ab"]
    keys = {f"key:{k}": np.arange(NUM_ROWS) for k in ("request_id", "user_id", "timestamp")}
    columns = {
        name: pa.array(part, pa.list_(pa.int64())) for name, part in zip("ab", lists, strict=True)
    }
    table = pa.table(
        {
            **keys,
            "key:item_id": candidates,
            "sequence:past_item": columns["a"],
            "sequence:liked_item": columns["b"],
        }
    )
    pq.write_table(table, path, row_group_size=10)
    return list(zip(candidates.tolist(), *lists, strict=True))


def _row_of(raw_id: int) -> int:
    return STORE.tolist().index(raw_id) if raw_id in STORE else NO_CONTENT


@pytest.mark.parametrize("names", [("past", "liked"), ("liked",), ()])
def test_batches_name_each_item_once_and_every_sample_finds_its_own(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    rows = _samples(tmp_path / "part.parquet")
    histories = {name: item_sequences(SCHEMA)[name] for name in names}
    files = SampleFiles(
        [tmp_path / "part.parquet"], SCHEMA, (), items=ItemSource(ItemIndex(STORE), histories)
    )
    seen = 0
    with SampleLoader(files, batch_size_per_rank=8).shuffled(Position()) as stream:
        for batch in stream:
            content = batch.content
            assert content is not None
            assert content.rows_U.tolist() == sorted(set(content.rows_U.tolist()))
            assert content.rows_U[0] == NO_CONTENT
            candidates = content.rows_U[content.candidate_B].tolist()
            requests = batch.keys_BK[:, 0].tolist()  # filling rows repeat real ones
            assert candidates == [_row_of(rows[request][0]) for request in requests]
            assert set(content.histories) == set(names)
            used = {NO_CONTENT, *candidates}
            for name, history in content.histories.items():
                events = content.rows_U[history.items_N].split(history.lengths_B.tolist())
                place = 1 + ("past", "liked").index(name)
                expected = [[_row_of(i) for i in rows[request][place]] for request in requests]
                assert [part.tolist() for part in events] == expected
                used.update(row for part in expected for row in part)
            assert used == set(content.rows_U.tolist())
            seen += batch.num_rows
    assert seen == NUM_ROWS


def test_without_an_index_batches_name_no_items(tmp_path: Path) -> None:
    _samples(tmp_path / "part.parquet")
    files = SampleFiles([tmp_path / "part.parquet"], SCHEMA, ())
    with SampleLoader(files, batch_size_per_rank=8).sequential() as stream:
        assert all(batch.content is None for batch in stream)


def test_an_empty_store_knows_no_item() -> None:
    index = ItemIndex(torch.empty(0, dtype=torch.int64))
    assert index.rows_of(torch.tensor([1, 2])).tolist() == [NO_CONTENT, NO_CONTENT]
    rows = ItemRows.of(index.rows_of(torch.tensor([1, 2])), {})
    assert rows.rows_U.tolist() == [NO_CONTENT]
    assert rows.candidate_B.tolist() == [0, 0]


def test_a_history_without_item_ids_is_refused() -> None:
    schema = SCHEMA.model_copy(update={"sequences": SCHEMA.sequences[:1]})
    with pytest.raises(UserError, match="no sequence of history 'liked' reads item_id"):
        item_sequences(schema)


def test_the_field_of_the_candidate_reads_its_id() -> None:
    with pytest.raises(UserError, match="no sparse feature reads item_id"):
        candidate_field(SCHEMA)
    sparse = (SparseFeature(name="shown", table="item", source="items", column="item_id"),)
    assert candidate_field(SCHEMA.model_copy(update={"sparse": sparse})) == "shown"

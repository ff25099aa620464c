"""Stored blocks that a rectangle needs, against a search through all of them."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from embedding import stored
from embedding.stored import CheckpointReader, StoredTensor, StoredTensorPlanner, take_rows

ROWS, COLUMNS = 50, 6


@pytest.fixture
def whole_and_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, CheckpointReader]:
    """Two column shards, each of row shards of other heights than the other's."""
    monkeypatch.setattr(stored, "BLOCK_BYTES", 5 * 3 * 4)  # 5 rows of 3 columns
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    pieces = [
        ((start, column), whole[start:stop, column : column + 3])
        for column, cuts in ((0, (0, 2, 31, 50)), (3, (0, 17, 50)))
        for start, stop in zip(cuts, cuts[1:], strict=False)
    ]
    save(
        {"t": StoredTensor([ROWS, COLUMNS], pieces[::-1])},
        storage_writer=FileSystemWriter(tmp_path),
        planner=StoredTensorPlanner(),
        no_dist=True,
    )
    return whole, CheckpointReader(tmp_path)


def test_any_rectangle_is_read_from_the_blocks_that_have_some_of_it(
    whole_and_reader: tuple[torch.Tensor, CheckpointReader],
) -> None:
    whole, reader = whole_and_reader
    chunks = reader._tensors["t"].chunks
    assert len(chunks) > 10
    for start in range(ROWS):
        for num_rows in (1, 4, 20):
            for column, width in ((0, 6), (2, 3), (4, 1)):
                target = torch.empty(min(num_rows, ROWS - start), width)
                reader.read_into("t", target, [start, column])
                assert torch.equal(target, whole[start : start + num_rows, column : column + width])
                found = {
                    item.storage_index.offset
                    for item in reader._read_items("t", target.size(), (start, column))
                }
                assert found == {
                    chunk.offsets
                    for chunk in chunks
                    if chunk.offsets[0] < start + target.shape[0]
                    and chunk.offsets[0] + chunk.sizes[0] > start
                    and chunk.offsets[1] < column + width
                    and chunk.offsets[1] + chunk.sizes[1] > column
                }
    assert torch.equal(torch.cat([block for _, block in reader.row_blocks("t")]), whole)


def test_a_block_is_found_without_a_look_at_most_others(
    whole_and_reader: tuple[torch.Tensor, CheckpointReader],
) -> None:
    _, reader = whole_and_reader
    list(reader.row_blocks("t"))
    chunks = reader._chunks["t"]
    for start in range(ROWS):
        # A block of 5 rows at most: those that start within 5 rows before, two columns of them.
        assert len(chunks.meeting(start, start + 1)) <= 6


def test_rows_are_taken_out_of_blocks() -> None:
    whole = torch.randn(50, 8)
    rows = torch.tensor([49, 0, 7, 7])
    assert torch.equal(take_rows([(0, whole[:20]), (20, whole[20:])], rows), whole[rows])

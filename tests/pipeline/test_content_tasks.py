"""Tasks of the content stage: what they store, and how much of it together."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding.errors import UserError
from multimodal.stored_content import ContentReader
from pipeline.content import reading, stage
from pipeline.content.reading import check_content, read_digests
from pipeline.content.stage import STORES, content
from pipeline.content.tasks import EncoderSettings, TokenWriter
from tests.one_process import encode_here
from tests.pipeline.small_log import run_here
from tests.pipeline.test_content import (
    Row,
    expected_tokens,
    items,
    picture,
    run_stage,
    small_content,
    write_items,
)


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process."""
    for module in (reading, stage):
        monkeypatch.setattr(module, "stream_tasks", run_here)
    monkeypatch.setattr(stage, "encode_on_workers", encode_here)


def assert_has_tokens_of(reader: ContentReader, rows: list[Row]) -> None:
    stored = reader.read(torch.arange(len(rows))).modalities["text"]
    for row, tokens_LH in enumerate(expected_tokens(rows, "text")):
        found = stored.tokens_ULH[row, stored.mask_UL[row]]
        torch.testing.assert_close(found, tokens_LH, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("change", ["text", "order", "fewer rows", "fewer groups"])
def test_another_catalogue_than_the_one_that_was_planned_is_not_stored(
    tmp_path: Path, change: str
) -> None:
    root, before = tmp_path / "data", items(1, 9)
    after = {
        "text": [*before[:4], before[4] | {"text": "quite another"}, *before[5:]],
        "order": before[::-1],
        "fewer rows": [row for row in before if row["item_id"] not in (4, 5)],
        "fewer groups": before[:3],
    }[change]
    write_items(root, before, row_group_size=5)
    checked = check_content(small_content(image=None), root)
    planned = checked, read_digests(checked)
    write_items(root, after, row_group_size=5)
    (tmp_path / "d0").mkdir()

    with pytest.raises(UserError, match=r"items\.parquet or .* changed while content read it"):
        content(planned, tmp_path / STORES, tmp_path / "d0")

    for day, rows in (("d1", after), ("d2", before)):
        write_items(root, rows, row_group_size=5)
        _, reader = run_stage(tmp_path, day, image=None)
        assert_has_tokens_of(reader, sorted(rows, key=lambda row: row["item_id"]))


def test_an_image_file_that_is_replaced_while_it_is_decoded_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    rows = [{"item_id": 1, "image": "1.png"}]
    pq.write_table(pa.Table.from_pylist(rows), root / "items.parquet")
    (root / "1.png").write_bytes(picture(1))
    build = TokenWriter.__init__

    def replacing(writer: TokenWriter, settings: EncoderSettings) -> None:
        build(writer, settings)
        encode = writer.encode

        def late(values: list[str]) -> object:
            encoded = encode(values)
            (root / "1.png").write_bytes(picture(2))
            return encoded

        writer.encode = late

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "__init__", replacing)
        with pytest.raises(UserError, match="or a file that it names in .* changed while content"):
            run_stage(tmp_path, "d1", text=None)
    facts, _ = run_stage(tmp_path, "d2", text=None)
    assert facts.modalities["image"].num_computed == 1


def test_new_items_of_several_row_groups_share_parts(tmp_path: Path) -> None:
    """Parts are of four items here, read and encoded by up to three."""
    write_items(tmp_path / "data", items(1, 12), row_group_size=3)
    run_stage(tmp_path, "d1", image=None)

    def parts() -> set[Path]:
        return {*(tmp_path / STORES).glob("text-*/*.parquet")}

    before = parts()
    rows = items(1, 12)
    for at in (1, 5, 9, 10):
        rows[at]["text"] = f"told anew {at}"
    write_items(tmp_path / "data", rows, row_group_size=3)
    facts, reader = run_stage(tmp_path, "d2", image=None)
    assert facts.modalities["text"].num_computed == 4
    (added,) = parts() - before
    assert sorted(pq.read_table(added)["item_id"].to_pylist()) == [2, 6, 10, 11]
    assert_has_tokens_of(reader, rows)
    assert len(before) <= 3, "and so do those of the first day"

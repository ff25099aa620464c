"""The content stage computes each item's tokens once, and loses no item."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from embedding.errors import UserError
from multimodal import item_tokens, token_store, towers
from multimodal.content_config import ContentConfig
from multimodal.item_inputs import build_preparer
from multimodal.item_tokens import LowerEncoder
from multimodal.stored_content import ContentReader
from multimodal.token_store import part_fault
from multimodal.tower_files import Tower
from multimodal.tower_models import load_model
from multimodal.towers import load_tower
from pipeline.content import reading, stage
from pipeline.content import tasks as content_tasks
from pipeline.content.facts import ContentFacts
from pipeline.content.reading import check_content, read_digests
from pipeline.content.stage import STORES, content
from tests.one_process import encode_here
from tests.pipeline.small_log import run_here

Row = dict[str, Any]


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def items(first: int, count: int) -> list[Row]:
    return [
        {
            "item_id": i,
            "text": f"item number {i} is " + "very " * (i % 4) + "good",
            "image": picture(i),
        }
        for i in range(first, first + count)
    ]


def write_items(root: Path, rows: list[Row], **options: Any) -> None:
    root.mkdir(exist_ok=True)
    schema = pa.schema([("item_id", pa.int64()), ("text", pa.string()), ("image", pa.binary())])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, root / "items.parquet", **options)


def small_content(**changes: Any) -> ContentConfig:
    towers: Row = {"text": {"max_tokens": 6, "precision": "float32"}, "image": {"image_size": 16}}
    tokens = {"items_per_batch": 3, "items_per_part": 4}
    return ContentConfig.model_validate({**towers, "dim": 8, "tokens": tokens, **changes})


@pytest.fixture(autouse=True)
def _serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, unless a test asks for Ray."""
    monkeypatch.setattr(reading, "stream_tasks", run_here)
    monkeypatch.setattr(stage, "stream_tasks", run_here)
    monkeypatch.setattr(stage, "encode_on_workers", encode_here)


def run_stage(tmp_path: Path, day: str, **changes: Any) -> tuple[ContentFacts, ContentReader]:
    directory = tmp_path / day
    directory.mkdir()
    checked = check_content(small_content(**changes), tmp_path / "data")
    facts = content((checked, read_digests(checked)), tmp_path / STORES, directory)
    return facts, ContentReader(directory, tmp_path / STORES)


def expected_tokens(rows: list[Row], modality: str) -> list[torch.Tensor]:
    """Lower-layer tokens of each item, computed alone."""
    tower = small_content().towers[modality]
    lower, prepare = load_tower(tower).lower, build_preparer(tower, Path())
    found = []
    for row in rows:
        prepared = prepare([row[modality]])
        found.append(lower(prepared.inputs)[0].clone())
    return found


@pytest.mark.parametrize("modality", ["text", "image"])
def test_every_item_has_the_tokens_of_its_own_content(tmp_path: Path, modality: str) -> None:
    rows = items(1, 11)
    write_items(tmp_path / "data", [rows[i] for i in (3, 1, 0, 2, *range(4, 11))], row_group_size=7)
    facts, reader = run_stage(tmp_path, "d1")
    assert facts.num_items == 11
    assert facts.modalities[modality].num_present == 11
    assert facts.modalities[modality].num_computed == 11
    assert reader.item_ids_N.tolist() == [row["item_id"] for row in rows]
    stored = reader.read(torch.arange(11)).modalities[modality]
    exact = {"text": 1e-6, "image": 1e-2}[modality]  # images are stored in half precision
    for row, tokens_LH in enumerate(expected_tokens(rows, modality)):
        assert int(stored.mask_UL[row].sum()) == len(tokens_LH)
        found = stored.tokens_ULH[row, : len(tokens_LH)].float()
        torch.testing.assert_close(found, tokens_LH, atol=exact, rtol=exact)


def test_only_new_and_changed_items_are_computed(tmp_path: Path) -> None:
    rows = items(1, 6)
    write_items(tmp_path / "data", rows)
    _, first = run_stage(tmp_path, "d1")
    changed = [{**rows[0], "text": "another text"}, *rows[1:5], *items(20, 2)]
    write_items(tmp_path / "data", changed)
    facts, second = run_stage(tmp_path, "d2")
    assert facts.num_items == 7
    assert facts.modalities["text"].num_computed == 3
    assert facts.modalities["image"].num_computed == 2
    before, after = (r.read(torch.arange(1, 5)).modalities["text"] for r in (first, second))
    assert torch.equal(before.tokens_ULH, after.tokens_ULH)
    old, new = (r.read(torch.tensor([0])).modalities["text"].mask_UL.sum() for r in (first, second))
    # `item number 1 is very good`, and `another text`.
    assert (int(old), int(new)) == (6, 2)


def test_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_items(tmp_path / "data", items(1, 5))
    run_stage(tmp_path, "d1")
    monkeypatch.setattr(content_tasks, "TokenWriter", None)
    facts, _ = run_stage(tmp_path, "d2", tokens={"items_per_batch": 1})
    assert [found.num_computed for found in facts.modalities.values()] == [0, 0]


def test_a_tower_cut_elsewhere_has_a_store_of_its_own(tmp_path: Path) -> None:
    write_items(tmp_path / "data", items(1, 3))
    run_stage(tmp_path, "d1")
    facts, _ = run_stage(tmp_path, "d2", text={"lora": None, "max_tokens": 6})
    assert [found.num_computed for found in facts.modalities.values()] == [3, 0]
    assert len(list((tmp_path / STORES).iterdir())) == 3


def test_items_that_lack_something_are_kept_and_counted(tmp_path: Path) -> None:
    rows = items(1, 6)
    rows[0]["text"] = None
    rows[1]["image"] = None
    rows[2] |= {"text": "  ", "image": b"no image"}
    rows[3]["image"] = rows[3]["image"][:200]
    rows[4]["text"] = "one " * 50
    write_items(tmp_path / "data", rows)
    facts, reader = run_stage(tmp_path, "d1", image={"image_size": 16, "max_pixels": 601})
    assert facts.num_items == 6
    assert facts.num_without_content == 1
    assert facts.modalities["text"].faults == {"missing": 2}
    assert facts.modalities["image"].faults == {"damaged": 2, "missing": 1}
    assert facts.modalities["text"].num_cut == 3  # 50 words, and two items of seven
    batch = reader.read(torch.arange(6))
    assert batch.modalities["text"].present.tolist() == [False, True, False, True, True, True]
    assert batch.modalities["image"].present.tolist() == [True, False, False, False, True, True]
    bombs, _ = run_stage(tmp_path, "d2", image={"image_size": 16, "max_pixels": 599})
    assert bombs.modalities["image"].faults["too many pixels"] == 4


def test_more_unreadable_images_than_the_recipe_allows_are_refused(tmp_path: Path) -> None:
    rows = items(1, 10)
    rows[0]["image"] = None
    rows[3]["image"] = b"no image"
    rows[4]["image"] = rows[4]["image"][:200]
    rows[5]["text"] = None
    write_items(tmp_path / "data", rows)

    def run_with(limit: float) -> ContentFacts:
        (tmp_path / f"{limit}").mkdir()
        checked = check_content(small_content(), tmp_path / "data", limit)
        return content((checked, read_digests(checked)), tmp_path / STORES, tmp_path / f"{limit}")

    assert run_with(0.2).modalities["image"].num_present == 7
    refusal = r"the images of 2 of 10 items .*max_quarantined_share=0.19 .*\(2 x damaged\).* 4;"
    with pytest.raises(UserError, match=refusal):
        run_with(0.19)


def test_a_catalogue_without_any_image_still_has_an_index(tmp_path: Path) -> None:
    write_items(tmp_path / "data", [{**row, "image": None} for row in items(1, 3)])
    facts, reader = run_stage(tmp_path, "d1")
    assert facts.modalities["image"].num_present == 0
    batch = reader.read(torch.arange(3))
    assert batch.modalities["image"].tokens_ULH.shape == (3, 1, 32)


def test_an_empty_catalogue_has_an_empty_index(tmp_path: Path) -> None:
    write_items(tmp_path / "data", [])
    facts, reader = run_stage(tmp_path, "d1")
    assert facts.num_items == reader.num_items == 0
    assert reader.rows_of(np.array([5])).tolist() == [-1]


def test_a_day_reads_only_what_is_new_for_its_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_items(tmp_path / "data", items(1, 9))
    run_stage(tmp_path, "d1")
    read: list[str] = []

    def watched(directory: Path, name: str) -> str | None:
        read.append(name)
        return part_fault(directory, name)

    on_workers: list[str] = []

    def recorded(run: Any, tasks: Any, shared: Any, rows: Any) -> Any:
        on_workers.extend(tasks)
        return run_here(run, tasks, shared, rows)

    monkeypatch.setattr(token_store, "part_fault", watched)
    monkeypatch.setattr(stage, "stream_tasks", recorded)
    run_stage(tmp_path, "d2")
    assert read == []
    before = {path.stem for path in (tmp_path / STORES).glob("*/*.safetensors")}
    write_items(tmp_path / "data", items(1, 11))
    run_stage(tmp_path, "d3")
    after = {path.stem for path in (tmp_path / STORES).glob("*/*.safetensors")}
    assert sorted(read) == sorted(on_workers) == sorted(after - before)
    assert len(read) == 2


def test_a_damaged_part_is_named_and_computed_again_once_deleted(tmp_path: Path) -> None:
    write_items(tmp_path / "data", items(1, 9))
    run_stage(tmp_path, "d1")
    part = next((tmp_path / STORES).glob("text-*/*.safetensors"))
    content_bytes = bytearray(part.read_bytes())
    content_bytes[-1] ^= 1
    part.write_bytes(content_bytes)
    with pytest.raises(UserError, match=rf"{part.name} of the token store is damaged"):
        run_stage(tmp_path, "d2")
    for path in part.parent.glob(f"{part.stem}.*"):
        path.unlink()
    facts, _ = run_stage(tmp_path, "d3")
    assert 0 < facts.modalities["text"].num_computed < 9
    assert facts.modalities["text"].num_present == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"column": "plot"}}, r"content\.text\.column.*no column 'plot'"),
        ({"text": {"column": "image"}, "image": None}, "must be a string"),
        ({"image": {"column": "item_id"}}, "bytes or a path"),
        ({"text": {"model": "./gone"}}, "no such directory"),
        ({"text": {"lora": {"target_modules": ["w"]}}}, "candidates are"),
    ],
)
def test_what_does_not_fit_shows_before_ray_starts(
    tmp_path: Path, changes: Row, message: str
) -> None:
    write_items(tmp_path / "data", items(1, 2))
    with pytest.raises(UserError, match=message):
        check_content(small_content(**changes), tmp_path / "data")


def test_tokens_beyond_the_precision_are_refused_and_name_the_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose layers end in values that half precision does not hold."""

    def loud(tower: Tower) -> torch.nn.Module:
        model = load_model(tower)
        for layer in model.encoder.layer:
            layer.output.LayerNorm.weight.data.mul_(1e5)
        return model

    monkeypatch.setattr(towers, "load_model", loud)
    rows = items(1, 3)
    rows[0]["text"] = None
    named = [{**row, "item_id": f"film/{row['item_id']}"} for row in rows]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "data" / "items.parquet")
    refusal = (
        r"the text tower 'tiny' gives item film/2 a token value of -?\d\S+, beyond the largest of "
        r"float16, 65504; set content\.text\.precision=bfloat16"
    )
    text = {"max_tokens": 6}
    with pytest.raises(UserError, match=refusal):
        run_stage(tmp_path, "d1", image=None, text={**text, "precision": "float16"})
    for day, precision in (("d2", "bfloat16"), ("d3", "float32")):
        _, reader = run_stage(tmp_path, day, image=None, text={**text, "precision": precision})
        stored = reader.read(torch.arange(3)).modalities["text"]
        assert stored.tokens_ULH[stored.mask_UL].isfinite().all()


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "cuda")])
def test_workers_use_a_gpu_only_where_the_stage_reserved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, device: str
) -> None:
    used: list[str] = []

    class Watched(LowerEncoder):
        def __init__(self, split: Any, prepare: Any, tower: Tower, where: torch.device) -> None:
            used.append(where.type)
            super().__init__(split, prepare, tower, torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(item_tokens, "LowerEncoder", Watched)
    write_items(tmp_path / "data", items(1, 2))
    run_stage(tmp_path, "d1", image=None, tokens={"gpus_per_worker": gpus})
    assert used == [device]


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_ray_workers_store_what_this_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_items(tmp_path / "data", items(1, 9), row_group_size=5)
    _, reader = run_stage(tmp_path, "d1", image=None)
    one = reader.read(torch.arange(9)).modalities["text"]
    monkeypatch.undo()
    (tmp_path / STORES).rename(tmp_path / "kept")
    facts, reader = run_stage(tmp_path, "d2", image=None)
    assert facts.modalities["text"].num_computed == 9
    two = reader.read(torch.arange(9)).modalities["text"]
    assert torch.equal(one.mask_UL, two.mask_UL)
    torch.testing.assert_close(one.tokens_ULH, two.tokens_ULH, atol=1e-5, rtol=1e-5)

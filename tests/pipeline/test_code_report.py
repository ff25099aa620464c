"""The code browser of the report against the codes it shows."""

import base64
import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedding.raw_ids import to_raw_ids
from multimodal.codes.config import Codes
from pipeline.artifacts import Manifest, StageFacts, publish
from pipeline.codes import report
from pipeline.codes.features import NearItems, codes_table
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.lookup import CodesOfRun
from pipeline.codes.quantize import quantize
from pipeline.codes.report import (
    NUM_FIRST_CODES,
    NUM_ITEMS,
    NUM_PREFIXES,
    browse,
    code_section,
)
from pipeline.content.tasks import Catalogue
from pipeline.recipe import load_recipe
from pipeline.reports.item_cards import shown_catalogue
from pipeline.reports.page import render
from pipeline.stages import StageRecord
from pipeline.summary import summarize, warnings_of, write_summary
from tests.pipeline.stage_facts import coded, decided, trained


def shown(root: Path) -> Catalogue:
    return Catalogue(root, {"text": "text", "image": "image"})


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
    vectors = np.zeros((len(ids), 2), np.float32)
    table = codes_table(ids, codes, vectors_ND=vectors)
    pq.write_table(table, tmp_path / "codes.parquet")
    read_table = Mock(wraps=pq.read_table)
    with patch.object(report.pq, "read_table", read_table):
        found = browse(tmp_path / "codes.parquet", shown(tmp_path))
    assert read_table.call_args_list[0].kwargs["columns"] == ["item_id", "sid_0", "sid_1"]

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
    (code,) = browse(tmp_path / "codes.parquet", shown(tmp_path))
    assert [item.title for item in code.shown] == ["item i0", "1 b c d e f g h", "2 b c d e f g h"]


def test_the_columns_that_towers_of_codes_read_are_shown(tmp_path: Path) -> None:
    catalogue(tmp_path, 2, titles=False)
    items = pq.read_table(tmp_path / "items.parquet")
    items = items.rename_columns(["item_id", "cover", "headline"])
    pq.write_table(items.append_column("text", pa.array(["old"] * 2)), tmp_path / "items.parquet")
    towers = "{text: {column: headline}, image: {column: cover}}"
    codes = f"codes={{vectors: {{kind: towers, content: {towers}}}}}"
    recipe = load_recipe("demo", [f"data.root={tmp_path}", "content={text: {}}", codes])
    ids = to_raw_ids(pa.array(["i0", "i1"])).to_numpy()
    pq.write_table(codes_table(ids, np.zeros((2, 1), np.int32)), tmp_path / "codes.parquet")

    (code,) = browse(tmp_path / "codes.parquet", shown_catalogue(recipe))
    table = pq.read_table(tmp_path / "codes.parquet")
    names = CodesOfRun(tmp_path, "2024-01-01", Mock(), table, recipe).names(ids.tolist())

    assert [item.title for item in code.shown] == ["item i0", "1 b c d e f g h"]
    assert [item.picture is not None for item in code.shown] == [False, True]
    assert names[int(ids[1])] == ("i1", "1 b c d e f g h")


def test_vq_codes_alone_have_no_browser(tmp_path: Path) -> None:
    none = np.empty((2, 0), np.int32)
    near = np.array([[0, 1], [1, 0]], np.int32)
    pq.write_table(
        codes_table(np.arange(2), none, None, NearItems(np.arange(2), near)),
        tmp_path / "codes.parquet",
    )
    assert browse(tmp_path / "codes.parquet", shown(tmp_path)) == []


def test_the_section_says_what_the_stage_found(tmp_path: Path) -> None:
    """A day of few items whose codes collide, suffixes that do not suffice, vectors all alike."""
    catalogue(tmp_path, 40, titles=True)
    ids = np.sort(to_raw_ids(pa.array([f"i{i}" for i in range(40)])).to_numpy())
    rng = np.random.default_rng(0)
    codes = Codes.model_validate(
        {"rq": {"num_levels": 1, "codebook_size": 18}, "vq": None, "suffix": {"num_codes": 2}}
    )
    x = 9 + rng.standard_normal((40, 5)).astype(np.float32)
    version = None
    for day in ("2026-01-01", "2026-01-02"):
        scratch = tmp_path / f"scratch-{day}"
        scratch.mkdir()
        items = ItemVectors(ids, x, "tower", "2026-01-01", day, version=version)
        facts = quantize(codes, items, tmp_path / "codebooks", scratch)
        version = facts.version
        (tmp_path / day).mkdir()
        told = coded(facts, num_without_vector=1)
        manifest = Manifest(stage="quantize", artifact_id=day, config_hash="c", facts=told)
        publish(scratch, tmp_path / day / "quantize", manifest)
    own = pq.read_table(tmp_path / "2026-01-02" / "quantize" / "codes.parquet")["sid_0"].to_numpy()
    sizes = np.bincount(own)
    sharing = int((sizes - 1)[sizes > 2].sum())
    assert sharing > 0

    pages = [
        " ".join(rendered(code_section(shown(tmp_path), tmp_path / day, "click")).split())
        for day in ("2026-01-01", "2026-01-02")
    ]

    tile = f"<small>Without a suffix of their own</small><b>{sharing}</b>"
    assert all(tile in page for page in pages)
    assert all("Warning: item vectors hardly differ (mean cosine" in page for page in pages)
    assert "<p>Fitted anew: there are no codebooks yet.</p>" in pages[0]
    # Nine tenths of 40 items are no more than two a codeword.
    assert (
        "<p>Not fitted anew: max_error_ratio was not looked at: the fit had too few items to hold "
        "some out. Drift: age 1 days, 0 items since the fit.</p>" in pages[1]
    )


def rendered(section: dict[str, Any] | None) -> str:
    return render("codes.html.j2", codes=section)


def test_the_summary_warns_of_what_a_stage_warned_of(tmp_path: Path) -> None:
    directory, records = tmp_path / "2026-01-01", []
    for stage, facts, warnings in (
        ("quantize", StageFacts(), ("item vectors hardly differ",)),
        ("train", trained(["2026-01-01"]), ()),
        ("gate", decided("it is bad"), ()),
    ):
        scratch = tmp_path / f"scratch-{stage}"
        scratch.mkdir()
        directory.mkdir(exist_ok=True)
        manifest = Manifest(
            stage=stage, artifact_id=stage, config_hash="c", facts=facts, warnings=warnings
        )
        records.append(StageRecord(stage, "ran", publish(scratch, directory / stage, manifest)))

    summary = summarize(directory, "small", records)

    written = json.loads(write_summary(summary, directory).read_text())
    assert written["warnings"] == ["item vectors hardly differ"]
    assert written["stages"]["gate"]["status"] == "refused"


def test_the_summary_repeats_what_stages_warned_of_and_ingest_only_once(tmp_path: Path) -> None:
    def record(stage: str, status: str, sentence: str) -> StageRecord:
        manifest = Manifest(
            stage=stage,
            artifact_id=stage,
            config_hash="c",
            facts=StageFacts(),
            warnings=(sentence,),
        )
        return StageRecord(stage, status, manifest)

    records = [
        record("ingest", "current", "old"),
        record("ingest", "ran", "new"),
        record("join", "current", "rows"),
        record("join", "current", "rows"),
    ]
    assert warnings_of(records) == ["new", "rows"]

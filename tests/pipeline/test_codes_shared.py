"""Two rankers on the codes of a third directory, through the command line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.numpy import load_file
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from deploy.app import main
from embedding.checkpoint_files import latest_step, step_directory
from embedding.stored import read_tables
from multimodal.codes.versions import load_version
from tests.one_process import in_one_process

pytestmark = pytest.mark.integration

NUM_ITEMS, NUM_OLD = 60, 40
CODES: dict[str, Any] = {
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"top_k": 3, "max_items": 80},
}
MAKES = {"vectors": {"kind": "column", "column": "vec"}, "features": {"vector_dims": 2}}
STEADY = "embedding.optimizer.learning_rate=1.0e-12"
"""Rows of tables stay as they were carried over."""


@dataclass(frozen=True)
class Outs:
    """Codes of three days, fitted anew on each, and the runs of two rankers on them."""

    folder: Path

    def command(self, name: str, day: int, *overrides: str) -> list[str]:
        recipe = str(self.folder / f"{name}.yaml")
        sets = [f"--set={override}" for override in overrides]
        return [
            *("--recipe", recipe, "--date", DAYS[day]),
            *("--out", str(self.folder / name), *sets),
        ]

    def manifest(self, name: str, day: int, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / name / DAYS[day] / stage / "manifest.json").read_text())

    def codes(self, day: int) -> dict[int, dict[str, Any]]:
        table = pq.read_table(self.folder / "codes" / DAYS[day] / "quantize" / "codes.parquet")
        return {row["item_id"]: row for row in table.to_pylist()}

    def samples(self, name: str, day: int) -> list[dict[str, Any]]:
        files = sorted((self.folder / name / DAYS[day] / "join" / "samples").rglob("*.parquet"))
        return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]

    def tables(self, name: str, day: int) -> dict[str, np.ndarray]:
        checkpoints = self.folder / name / DAYS[day] / "train" / "checkpoint"
        step = latest_step(checkpoints)
        assert step is not None
        return {
            table: np.concatenate([block.numpy() for _, block in blocks])
            for table, blocks in read_tables(step_directory(checkpoints, step))
        }


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Outs:
    """One ranker runs on the first and the third day, the other one on the third only."""
    outs = Outs(tmp_path_factory.mktemp("shared"))
    root = outs.folder / "data"
    write_catalogue(root, num_items=NUM_ITEMS)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 8))[np.arange(NUM_ITEMS) % 6]
    x = (x + 0.3 * rng.standard_normal((NUM_ITEMS, 8))).astype(np.float32)
    items = pq.read_table(root / "items.parquet").append_column("vec", pa.array(x.tolist()))
    pq.write_table(items, root / "items.parquet")
    for i in range(4):
        living = min(NUM_OLD + 10 * i, NUM_ITEMS)
        rows = [
            event(i, 1 + k % 5, 30 * k, item_id=1 + (7 * k) % living, click=int(k % 3 > 0))
            for k in range(180)
        ]
        write_day(root, i, [rows])
        for path in (root / "events" / f"dt={DAYS[i]}").glob("*.parquet"):
            table = pq.read_table(path)
            like = pa.array((table["item_id"].to_numpy() % 2).astype(np.int8))
            pq.write_table(table.append_column("like", like), path, row_group_size=4)
    base = make_recipe(root).model_dump(mode="json")
    base["cluster"]["num_workers"] = 1
    base["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0]}
    base["ranking"]["trainer"] |= {"batch_size_per_rank": 16, "seed": 5}
    refits = {"refit": {"force_on": list(DAYS[1:3])}}
    takes = {**CODES, "taken_from": str(outs.folder / "codes")}
    for name, codes, ranking in (
        ("codes", {**CODES, **MAKES, **refits}, {}),
        (
            "first",
            {**takes, "features": {"histories": ["clicks"], "embedding_dim": 8}},
            {"model": {"interests": [{"kind": "din", "history": "clicks"}]}},
        ),
        (
            "second",
            {
                **takes,
                "features": {
                    "families": ["candidate", "shared"],
                    "embedding_dim": 8,
                    "vector_dims": 1,
                },
            },
            {"tasks": [{"name": "like"}, {"name": "click"}]},
        ),
    ):
        recipe = {**base, "name": name, "codes": codes, "ranking": {**base["ranking"], **ranking}}
        (outs.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    with in_one_process():
        for day in range(3):
            assert main(["stage", "quantize", *outs.command("codes", day)]) == 0
        assert main(["run", *outs.command("first", 0)]) == 0
        assert main(["run", *outs.command("first", 2, STEADY)]) == 0
        assert main(["run", *outs.command("second", 2)]) == 0
    return outs


def test_codes_are_made_without_a_ranker(outs: Outs) -> None:
    made = {path.name for path in (outs.folder / "codes" / DAYS[2]).iterdir()}
    assert made == {"ingest", "quantize", "recipe.yaml"}
    assert not list((outs.folder / "codes").glob("*/train"))
    assert [outs.manifest("codes", d, "quantize")["facts"]["version"] for d in range(3)] == [
        *("v0001", "v0002", "v0003")
    ]


def test_codes_made_by_workers_of_ray_are_the_same(outs: Outs, tmp_path: Path) -> None:
    recipe, out = str(outs.folder / "codes.yaml"), str(tmp_path / "codes")
    words = ["--recipe", recipe, "--date", DAYS[0], "--out", out]
    workers = "codes.encode={num_workers: 2, items_per_task: 25}"
    assert main(["stage", "quantize", *words, "--set", workers]) == 0
    assert not ray.is_initialized()
    theirs = outs.manifest("codes", 0, "quantize")
    ours = json.loads((tmp_path / "codes" / DAYS[0] / "quantize" / "manifest.json").read_text())
    assert ours["checksums"] == theirs["checksums"]
    assert ours["facts"] == theirs["facts"]
    assert ours["artifact_id"] == theirs["artifact_id"]


@pytest.mark.parametrize(("name", "day"), [("first", 0), ("first", 2), ("second", 2)])
def test_samples_hold_exactly_the_codes_that_were_taken(outs: Outs, name: str, day: int) -> None:
    codes = outs.codes(day)
    samples = outs.samples(name, day)
    assert len({row["key:item_id"] for row in samples}) > 30
    for row in samples:
        own = codes[row["key:item_id"]]
        assert (row["sparse:sid_0"], row["sparse:sid_1"]) == (own["sid_0"], own["sid_1"])
        assert row["sparse:vq"] == own["vq"]
        if name == "second":
            assert row["dense:vector_0"] == pytest.approx(own["vector"][0])
            assert "dense:vector_1" not in row
            assert not any(column.startswith("sequence:clicks_") for column in row)
        else:
            past = zip(row["sequence:past_item"], row["sequence:clicks_sid_0"], strict=True)
            assert all(code == codes[item]["sid_0"] for item, code in past if item >= 0)
    assert not (outs.folder / name / DAYS[day] / "align").exists()


def test_each_ranker_trains_tables_of_its_own(outs: Outs) -> None:
    cold, other = outs.tables("first", 0), outs.tables("second", 2)
    for table in ("sid_0", "sid_1", "vq"):
        assert cold[table].shape == other[table].shape
        moved = np.abs(cold[table] - other[table]).max(axis=1) > 1e-4
        assert moved.any(), table
    assert (
        outs.manifest("first", 2, "train")["facts"]["codebooks"]
        == outs.manifest("second", 2, "train")["facts"]["codebooks"]
    )


def test_rows_are_carried_over_two_refits(outs: Outs) -> None:
    before, after = outs.tables("first", 0), outs.tables("first", 2)
    assert outs.manifest("first", 2, "train")["facts"]["parent"] == DAYS[0]
    books = outs.folder / "first" / "codebooks"
    assert sorted(path.name for path in books.glob("v*")) == ["v0001", "v0002", "v0003"]
    # Naively: version by version, a row at a time, from the maker's own files.
    for table in ("sid_0", "sid_1", "vq"):
        rows: dict[int, np.ndarray] = dict(enumerate(before[table][1:]))
        for version in ("v0002", "v0003"):
            steps = load_file(outs.folder / "codes" / "codebooks" / version / "carries.safetensors")
            sources = steps[f"{table}.source"].tolist()
            rows = {
                code: rows[source]
                for code, source in enumerate(sources)
                if source >= 0 and source in rows
            }
        assert len(rows) >= 4
        for code, row in rows.items():
            np.testing.assert_allclose(after[table][code + 1], row, atol=1e-6)
        np.testing.assert_allclose(after[table][0], before[table][0], atol=1e-6)
    # A VQ slot is its item: rows of items that were there stay theirs.
    first, third = (load_version(books, v).items for v in ("v0001", "v0003"))
    assert first
    assert third
    slots = third.slots_of(first.item_ids_N)
    assert (slots >= 0).all()
    known = len(first.item_ids_N)
    np.testing.assert_allclose(after["vq"][1 + slots], before["vq"][1 : known + 1], atol=1e-6)
    counts = outs.manifest("first", 2, "train")["facts"]["result"]["warm_start"]["rows"]["vq"]
    assert counts == {"carried": known + 1, "sourced": len(third.item_ids_N) - known, "redrawn": 0}


def test_report_and_commands_say_whose_codes_these_are(
    outs: Outs, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (outs.folder / "first" / DAYS[2] / "report.html").read_text()
    assert f"Taken from the runs of {outs.folder / 'codes'}" in page
    assert f"after {DAYS[0]}, whose codes are of v0001" not in page  # fitted on the day itself
    assert "whose reports say how item vectors were made" in page
    capsys.readouterr()
    assert main(["codes", "versions", "--out", str(outs.folder / "first")]) == 0
    shown = capsys.readouterr().out
    runs = [line.split()[-1] for line in shown.splitlines() if re.match(r"v\d{4} ", line)]
    assert runs == [DAYS[0], "-", DAYS[2]]
    assert main(["codes", "show", "--out", str(outs.folder / "second"), "--item", "5"]) == 0
    assert main(["validate", "--recipe", str(outs.folder / "first.yaml")]) == 0
    assert "codes are taken from the runs of" in capsys.readouterr().out
    assert main(["status", "--out", str(outs.folder / "first")]) == 0
    assert re.search(r"quantize\W+current", capsys.readouterr().out)


def test_a_bundle_scores_samples_of_any_ranker_on_its_codebooks(
    outs: Outs, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = outs.folder / "first" / DAYS[3] / "join" / "samples"
    paths = ["--samples", str(samples), "--output", str(outs.folder / "scores.parquet")]
    bundles = [outs.folder / "first" / DAYS[d] / "publish" / "bundle" for d in (0, 2)]
    assert main(["score", "--bundle", str(bundles[1]), *paths]) == 0
    capsys.readouterr()
    assert main(["score", "--bundle", str(bundles[0]), *paths]) == 2
    assert re.search("codes of codebooks v0003-.* was trained with v0001-", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (("run",), ["codes.rq.codebook_size=8"], "codes.rq.codebook_size=4 there, 8 here"),
        (("run",), ["codes.taken_from=nowhere"], "codes.taken_from=nowhere is no directory"),
        (("stage", "align"), [], "stage align makes item vectors, and codes.taken_from"),
        (
            ("stage", "quantize"),
            ["window.warm_start=false", "evaluation.held_out_items={share: 0.3}"],
            r"v0003 were fitted to 60 items, \d+ of them held out here",
        ),
    ],
)
def test_faults_end_with_what_to_change(
    outs: Outs,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    overrides: list[str],
    message: str,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in outs.folder.rglob("manifest.json")}
    capsys.readouterr()
    with in_one_process():
        assert main([*words, *outs.command("second", 2, *overrides)]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert {p: p.stat().st_mtime_ns for p in outs.folder.rglob("manifest.json")} == before


def test_a_backfill_is_refused_before_its_first_day(
    outs: Outs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = yaml.safe_load((outs.folder / "second.yaml").read_text())
    codes = outs.folder / "two-days"
    codes.mkdir()
    for day in (0, 1):
        (codes / DAYS[day]).symlink_to(outs.folder / "codes" / DAYS[day])
    recipe["codes"]["taken_from"] = str(codes)
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    words = ["--recipe", str(tmp_path / "second.yaml"), "--out", str(tmp_path / "out")]
    assert main(["backfill", "--from", DAYS[0], "--to", DAYS[2], *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"holds no codes of {DAYS[2]} (there are: {DAYS[0]}, {DAYS[1]})" in said
    assert not list((tmp_path / "out").glob("20*"))

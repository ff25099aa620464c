"""Days with codes through the command line: births, a forced refit, what is carried, bad input."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from deploy.app import main
from deploy.serving.live_model import LiveModel, ModelSource
from deploy.serving.wire import ScoreRequest
from pipeline.summary import Summary
from tests.deploy.served import ingested, request_of

pytestmark = pytest.mark.integration

NUM_ITEMS, NUM_OLD = 60, 40
NO_VECTOR = 7
CODES = {
    "vectors": {"kind": "column", "column": "vec"},
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"top_k": 3, "max_items": 80},
    "features": {"histories": ["clicks"], "embedding_dim": 8},
}


@dataclass(frozen=True)
class Days:
    """Two finished runs; the second one has fitted its codebooks anew."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs"

    def command(self, day: int) -> list[str]:
        return [
            *("--recipe", str(self.folder / "coded.yaml"), "--date", DAYS[day]),
            *("--set", f"codes.refit.force_on=[{DAYS[1]}]", "--out", str(self.out)),
        ]

    def facts(self, day: int, stage: str) -> dict[str, Any]:
        return json.loads((self.out / DAYS[day] / stage / "manifest.json").read_text())["facts"]

    def samples(self, day: int) -> pa.Table:
        files = sorted((self.out / DAYS[day] / "join" / "samples").rglob("*.parquet"))
        return pa.concat_tables([pq.ParquetFile(file).read() for file in files])


def vectors() -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((6, 8))
    x = centres[np.arange(NUM_ITEMS) % 6] + 0.3 * rng.standard_normal((NUM_ITEMS, 8))
    return x.astype(np.float32)


def write_vectors(root: Path, x: Any) -> None:
    items = pq.read_table(root / "items.parquet")
    if "vec" in items.column_names:
        items = items.drop_columns(["vec"])
    column = pa.array([None if i == NO_VECTOR - 1 else row for i, row in enumerate(x)])
    pq.write_table(items.append_column("vec", column), root / "items.parquet")


@pytest.fixture(scope="module")
def days(one_process: None, tmp_path_factory: pytest.TempPathFactory) -> Days:
    """Items 41 .. 50 are first seen on the second day, 51 .. 60 on the third."""
    days = Days(tmp_path_factory.mktemp("codes"))
    root = days.folder / "data"
    write_catalogue(root, num_items=NUM_ITEMS)
    write_vectors(root, vectors().tolist())
    for i in range(3):
        living = NUM_OLD + 10 * i
        rows = [
            event(i, 1 + k % 5, 30 * k, item_id=1 + (7 * k) % living, click=int(k % 3 > 0))
            for k in range(180)
        ]
        write_day(root, i, [rows])
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["codes"] = CODES
    recipe["cluster"]["num_workers"] = 1
    recipe["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0]}
    recipe["ranking"]["model"] = {"interests": [{"kind": "din", "history": "clicks"}]}
    recipe["ranking"]["trainer"] |= {"batch_size_per_rank": 16, "seed": 5}
    (days.folder / "coded.yaml").write_text(yaml.safe_dump(recipe))
    for day in (0, 1):
        assert main(["run", *days.command(day)]) == 0
    return days


def test_new_items_have_codes_on_their_first_day(days: Days) -> None:
    samples = days.samples(2).to_pylist()
    born = [row for row in samples if row["key:item_id"] > NUM_OLD + 10]
    assert born
    assert all(0 <= row["sparse:sid_0"] < 4 and len(row["sparse:vq"]) == 3 for row in born)
    without = [row for row in samples if row["key:item_id"] == NO_VECTOR]
    assert without
    assert all((row["sparse:sid_0"], row["sparse:vq"]) == (-1, [-1]) for row in without)
    first, second = (days.facts(day, "quantize") for day in (0, 1))
    assert (first["num_items"], first["num_without_vector"]) == (NUM_ITEMS - 1, 1)
    assert (first["num_unseen_items"], second["num_unseen_items"]) == (20, 10)
    assert first["table_sizes"]["vq"] == NUM_OLD - 1


def test_samples_of_a_day_have_the_codebooks_of_the_run_that_trains_on_them(days: Days) -> None:
    assert days.facts(0, "quantize")["version"] == "v0001"
    second = days.facts(1, "quantize")
    assert (second["version"], second["previous"]) == ("v0002", DAYS[0])
    assert second["refit"] == {"refit": True, "reasons": ["asked for"]}
    codes = pq.read_table(days.out / DAYS[1] / "quantize" / "codes.parquet").to_pydict()
    vq = dict(zip(codes["item_id"], codes["vq"], strict=True))
    for day in (1, 2):
        for row in days.samples(day).to_pylist():
            assert row["sparse:vq"] == vq.get(row["key:item_id"], [-1])
    assert max(max(near) for near in vq.values()) == NUM_OLD + 10 - 2  # all seen items but one


def test_code_tables_go_on_through_the_refit(days: Days) -> None:
    report = days.facts(1, "train")["result"]["warm_start"]

    assert report["initialised"] == {}
    rows = report["rows"]
    assert set(rows) == {"sid_0", "sid_1", "vq"}
    assert sum(rows["sid_0"].values()) == 5
    # 39 items and the OOV row; the ten that came start from the nearest item.
    assert rows["vq"] == {"carried": NUM_OLD, "sourced": 10, "redrawn": 0}
    page = (days.out / DAYS[1] / "report.html").read_text()
    assert "rows of 3 code tables" in page


def test_the_report_shows_both_sides_of_the_refit(days: Days) -> None:
    rows = []
    for day in (0, 1):
        folder = days.out / DAYS[day]
        metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
        click = metrics["tasks"]["click"]
        codes = [
            {row["item_id"]: (row["sid_0"], row["sid_1"]) for row in table.to_pylist()}
            for table in (
                pq.read_table(days.out / DAYS[d] / "quantize" / "codes.parquet")
                for d in range(day + 1)
            )
        ]
        kept = [codes[-1][item] == code for item, code in codes[0].items() if item in codes[-1]]
        rows.append(
            [
                DAYS[day],
                "v0001 fitted anew" if day == 0 else "v0002 fitted anew",
                "-" if day == 0 else f"{100 * np.mean(kept):.1f}%",
                f"{click['auc']:.4f}",
                f"{click['slices']['cold']['auc']:.4f}",
            ]
        )
    page = (days.out / DAYS[1] / "report.html").read_text()
    table = page.partition("Runs up to this one")[2].partition("</table>")[0]
    shown = [
        [" ".join(re.sub("<[^>]+>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr><td>.*?</tr>", table)
    ]
    assert shown == rows
    first = (days.out / DAYS[0] / "report.html").read_text()
    assert "Runs up to this one" not in first


def test_a_bundle_scores_samples_of_its_own_codebooks_only(
    days: Days, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = days.out / DAYS[2] / "join" / "samples"
    scores = days.folder / "scores.parquet"

    def score(day: int) -> int:
        bundle = days.out / DAYS[day] / "publish" / "bundle"
        paths = ["--bundle", str(bundle), "--samples", str(samples), "--output", str(scores)]
        return main(["score", *paths])

    assert score(1) == 0
    predicted = pq.read_table(days.out / DAYS[1] / "evaluate" / "predictions")
    by_id = [("key:request_id", "ascending"), ("key:user_id", "ascending")]
    np.testing.assert_allclose(
        pq.read_table(scores).sort_by(by_id)["probability:click"].to_numpy(),
        predicted.sort_by(by_id)["probability:click"].to_numpy(),
        rtol=1e-5,
    )
    assert score(0) == 2
    assert re.search("codes of codebooks v0002-.* was trained with v0001-", capsys.readouterr().err)


def test_served_candidates_without_codes_are_counted(days: Days) -> None:
    bundle = days.out / DAYS[1] / "publish" / "bundle"
    live = LiveModel(ModelSource(bundle=bundle, data=days.folder / "data"))
    body = request_of(ingested(days.out)[0], [1, NO_VECTOR, NUM_ITEMS + 9])
    rows = live.now.scorer.rows(ScoreRequest.model_validate(body), now_ms=0)
    (found,) = live.now.scorer.score([rows])
    assert (found.unknown_candidates, found.candidates_without_codes) == (1, 2)


def test_summary_and_second_run(days: Days, capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary.model_validate_json((days.out / DAYS[1] / "summary.json").read_text())
    assert list(summary.stages)[:3] == ["ingest", "quantize", "join"]
    before = {path: path.stat().st_mtime_ns for path in days.out.rglob("manifest.json")}
    assert main(["run", *days.command(1)]) == 0
    assert {path: path.stat().st_mtime_ns for path in days.out.rglob("manifest.json")} == before
    assert main(["status", "--out", str(days.out)]) == 0
    assert re.search(r"quantize\W+current", capsys.readouterr().out)


def refused(days: Days, capsys: pytest.CaptureFixture[str], option: str) -> str:
    """What a run of the second day says; it changes no codes and no codebooks."""
    before = {path: path.stat().st_mtime_ns for path in days.out.rglob("codes*.parquet")}
    versions = sorted((days.out / "codebooks").glob("v*"))
    capsys.readouterr()
    assert main(["run", *days.command(1), option]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in days.out.rglob("codes*.parquet")} == before
    assert sorted((days.out / "codebooks").glob("v*")) == versions
    return " ".join(said.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codes.rq.codebook_size=64", r"codebook_size=64 needs .* are 49;.* 49 of 59 items"),
        ("codes.version=v0009", r"codebook version 'v0009' is not in .*there are: v0001, v0002"),
        ("codes.vq.max_items=20", r"max_items=20 is less than the 49 items"),
        ("codes.vectors.column=weights", r"lacks the columns \['weights'\]"),
        ("codes.vectors.column=category", r"'category' has type string but must hold"),
        ("codes.features.embedding_dim=6", r"embedding_dim=6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    days: Days, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert re.search(message, refused(days, capsys, f"--set={override}"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("constant", r"all 49 item vectors are equal, so codes cannot tell items apart"),
        ("nan", r"the vector 'vec' of item_id 12 holds NaN, null or infinity \(1 items"),
        ("short", r"the vector 'vec' of item_id 12 does not have 8 elements"),
    ],
)
def test_vectors_that_carry_nothing_are_refused(
    days: Days, capsys: pytest.CaptureFixture[str], fault: str, message: str
) -> None:
    path = days.folder / "data" / "items.parquet"
    stat, content = path.stat(), path.read_bytes()
    x = vectors().tolist()
    match fault:
        case "constant":
            x = [[0.5] * 8] * NUM_ITEMS
        case "nan":
            x[11][3] = float("nan")
        case _:
            x[11] = x[11][:5]
    write_vectors(path.parent, x)
    try:
        assert re.search(message, refused(days, capsys, "--refresh-catalogue"))
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_stage_that_has_nothing_to_do_says_so(
    days: Days, capsys: pytest.CaptureFixture[str]
) -> None:
    # The attention of this recipe compares codes.
    without = ("--set", "codes=null", "--set", "ranking.model.interests=[]")
    assert main(["stage", "quantize", *days.command(0), *without]) == 2
    assert "codes is null" in capsys.readouterr().err

"""One day of a small log through the command line, and what must agree with it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_log import DAYS, event, file_bytes, make_recipe, write_catalogue, write_day

from deploy.app import main
from pipeline.summary import Summary
from tests.one_process import in_one_process

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Day:
    """A finished `braid run`, on Ray."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs"

    @property
    def command(self) -> list[str]:
        return ["--recipe", str(self.folder / "small.yaml"), "--date", DAYS[0]]


@pytest.fixture(scope="module")
def day(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Day:
    """Two days of 90 events; a managed table, a mean, an averaged ranker, one rank."""
    day = Day(tmp_path_factory.mktemp("day"))
    root = day.folder / "data"
    write_catalogue(root)
    for i in (0, 1):
        rows = [event(i, 1 + k % 5, 60 * k, item_id=1 + k % 4, click=k % 2) for k in range(90)]
        write_day(root, i, [rows])
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["cluster"]["num_workers"] = 1
    recipe["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0]}
    recipe["ranking"]["trainer"] |= {
        "batch_size_per_rank": 16,
        "seed": 5,
        "epochs": 2,
        "ema_decay": 0.9,
    }
    recipe["features"]["tables"][0]["ids"] = {"kind": "managed_collision"}
    recipe["features"]["sparse"][3]["pooling"] = "mean"
    (day.folder / "small.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", *day.command, "--out", str(day.out)]) == 0
    return day


def read_rows(path: Path) -> Any:
    return pq.read_table(path).sort_by([("key:request_id", "ascending")])


def test_scores_of_the_bundle_equal_the_trainers_predictions(day: Day) -> None:
    run = day.out / DAYS[0]
    samples, scores = day.out / DAYS[1] / "join" / "samples", day.folder / "scores.parquet"

    code = main(
        ["score", "--bundle", str(run / "publish" / "bundle"), "--samples", str(samples)]
        + ["--output", str(scores), "--batch-size", "7"]
    )

    assert code == 0
    predicted, scored = read_rows(run / "evaluate" / "predictions"), read_rows(scores)
    assert scored["key:request_id"].equals(predicted["key:request_id"])
    np.testing.assert_allclose(
        scored["probability:click"].to_numpy(),
        predicted["probability:click"].to_numpy(),
        rtol=1e-6,  # float32; batches are cut differently
    )
    assert len(set(scored["probability:click"].to_pylist())) > 10


def test_rows_that_nobody_has_seen_are_scored_as_a_day_without_labels(
    day: Day, tmp_path: Path
) -> None:
    root, out = shutil.copytree(day.folder / "data", tmp_path / "data"), tmp_path / "runs"
    rows = [event(2, 1 + k % 5, 60 * k, item_id=1 + k % 4, click=None) for k in range(8)]
    write_day(root, 2, [rows])
    scores = tmp_path / "scores.parquet"

    recipe, before = day.command[:2], ["--date", DAYS[1]]
    data = ["--out", str(out), "--set", f"data.root={root}"]
    with in_one_process():
        assert main(["stage", "join", *recipe, *before, *data]) == 0
    bundle = ["--bundle", str(day.out / DAYS[0] / "publish" / "bundle")]
    samples = ["--samples", str(out / DAYS[2] / "join" / "samples")]
    assert main(["score", *bundle, *samples, "--output", str(scores)]) == 0

    scored = read_rows(scores)
    keys = [f"key:{name}" for name in ("request_id", "user_id", "item_id", "timestamp")]
    assert scored.column_names == [*keys, "probability:click"]
    found = scored.select(keys).to_pylist()
    assert [list(row.values()) for row in found] == [
        [row["request_id"], row["user_id"], row["item_id"], row["timestamp"]] for row in rows
    ]


def test_an_exported_bundle_is_the_published_one(day: Day, tmp_path: Path) -> None:
    to = tmp_path / "handed-over"
    assert main(["export", "--out", str(day.out), "--date", DAYS[0], "--to", str(to)]) == 0
    assert file_bytes(to) == file_bytes(day.out / DAYS[0] / "publish" / "bundle")


def test_bundle_holds_no_pickle_and_a_damaged_file_is_named(
    day: Day, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = day.out / DAYS[0] / "publish" / "bundle"
    assert {path.suffix for path in bundle.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }
    copy = tmp_path / "bundle"
    for path in bundle.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    dense = copy / "dense.safetensors"
    dense.write_bytes(dense.read_bytes()[:-1] + b"?")

    samples = day.out / DAYS[1] / "join" / "samples"
    command = ["score", "--bundle", str(copy), "--samples", str(samples)]
    assert main([*command, "--output", str(tmp_path / "scores.parquet")]) == 2

    assert f"bundle file {dense} is missing or damaged" in capsys.readouterr().err
    assert not (tmp_path / "scores.parquet").exists()


def test_summary_and_report_are_there(day: Day) -> None:
    directory = day.out / DAYS[0]
    summary = Summary.model_validate_json((directory / "summary.json").read_text())

    assert list(summary.stages) == [
        *("ingest", "join", "plan", "train", "evaluate", "gate", "publish")
    ]
    assert summary.train.world_size == 1
    assert summary.eval["click"].num_rows == 90
    page = (directory / "report.html").read_text()
    assert summary.run_id in page
    assert re.search(r"<td>category</td><td>hashed</td><td class=\"n\">\d+", page), "ids by table"
    assert re.findall(r"(?:src|href)=\"(?!#)", page) == [], "the page stands alone"


def test_second_run_changes_nothing(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in day.out.rglob("manifest.json")}

    assert main(["run", *day.command, "--out", str(day.out)]) == 0

    assert {path: path.stat().st_mtime_ns for path in day.out.rglob("manifest.json")} == before
    assert "+ " not in capsys.readouterr().out


def test_status_says_what_became_stale(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--out", str(day.out)]) == 0
    assert "stale" not in capsys.readouterr().out
    (events,) = (day.folder / "data" / "events" / f"dt={DAYS[0]}").glob("*.parquet")
    content = events.read_bytes()
    table = pq.read_table(events)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), events)
    try:
        assert main(["status", "--out", str(day.out)]) == 0
        assert "changed: events" in capsys.readouterr().out
    finally:
        events.write_bytes(content)


def test_a_refused_model_ends_with_a_code_of_its_own(
    day: Day, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing failed and nothing is to be changed: an operator must be able to tell."""
    out = ["--out", str(shutil.copytree(day.out, tmp_path / "runs"))]
    days = ["--from", DAYS[0], "--to", DAYS[0]]
    strict = ["--set", "gate.calibration=[90, 100]"]

    with in_one_process():
        for command in (["run"], ["stage", "gate"], ["stage", "publish"]):
            assert main([*command, *day.command, *out, *strict]) == 3, command
            said = capsys.readouterr().out
            assert "gate refused" in said
            assert "outside gate.calibration=[90.0, 100.0]" in " ".join(said.split())
        assert main(["backfill", *day.command[:2], *days, *out, *strict]) == 3
        assert main(["stage", "evaluate", *day.command, *out, *strict]) == 0
    capsys.readouterr()
    assert main(["status", *out]) == 0
    assert re.search(r" gate +refused ", capsys.readouterr().out)


def test_status_reads_every_file_where_it_is_asked_to(
    day: Day, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ["status", "--out", str(day.out), "--verify"]
    assert main(verify) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    file = day.out / DAYS[0] / "evaluate" / "metrics.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"0", b"1", 1))
    try:
        assert main(verify) == 1
        assert f"{file} is missing or damaged" in capsys.readouterr().out
    finally:
        file.write_bytes(content)


def test_trial_of_a_study_equals_the_day_and_is_not_repeated(
    day: Day, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = 'wide: ["ranking.model.classifier={kind: dnn, hidden: [64]}"]'
    (day.folder / "variants.yaml").write_text(f"plain: []\n{wide}\n")
    variants = ["--variants", str(day.folder / "variants.yaml"), "--seeds", "2"]
    out = day.folder / "study"
    study = ["study", *day.command, *variants, "--out", str(out)]

    assert main([*study, "--json", str(day.folder / "study.json")]) == 0, capsys.readouterr()

    trial = out / "trials" / "plain" / "seed-5" / "metrics.json"
    alone = day.out / DAYS[0] / "evaluate" / "metrics.json"
    assert trial.read_text() == alone.read_text()
    result = json.loads((day.folder / "study.json").read_text())
    assert list(result["variants"]) == ["plain", "wide"]
    values = result["variants"]["plain"]["click.auc"]["values"]
    assert values[0] == json.loads(trial.read_text())["tasks"]["click"]["auc"]
    logloss = result["variants"]["plain"]["click.logloss"]["values"]
    assert logloss[0] != logloss[1], "another seed"
    assert list(result["paired"]) == ["wide"]
    assert "wide" in (out / "study.html").read_text()
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    assert main(study) == 0
    assert "4 of them done before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")} == finished


def test_new_feature_is_said_to_widen_what_reads_it(
    day: Day, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [event(2, 1 + k % 5, 60 * k, item_id=1 + k % 4, click=k % 2) for k in range(90)]
    write_day(day.folder / "data", 2, [rows])
    recipe = yaml.safe_load((day.folder / "small.yaml").read_text())
    recipe["features"]["tables"].append({"name": "rating", "num_embeddings": 9})
    recipe["features"]["sparse"].append({"name": "rating", "table": "rating", "column": "stars"})
    path = day.folder / "wider.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = ["--recipe", str(path), "--date", DAYS[1], "--out", str(day.out)]

    with in_one_process():
        assert main(["run", *command]) == 0

    facts = json.loads((day.out / DAYS[1] / "train" / "manifest.json").read_text())["facts"]
    report = facts["result"]["warm_start"]
    initialised, carried = report["initialised"], report["carried"]
    assert initialised["tables/rating"] == "not in the checkpoint"
    others = [why for name, why in initialised.items() if name != "tables/rating"]
    assert others, "layers that read all features"
    assert all(why.startswith("shape changed") for why in others)
    expected = f"carried {len(carried)}, redrawn {len(initialised)} (tables/rating, dense/"
    line = f"warm start from {DAYS[0]}: {expected}"
    assert line in capsys.readouterr().out
    page = (day.out / DAYS[1] / "report.html").read_text()
    assert line in page
    assert "shape changed from" in page
    assert "cold start: all values were drawn" in (day.out / DAYS[0] / "report.html").read_text()

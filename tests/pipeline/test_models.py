"""What `braid models` shows of bundles, whether their runs are still there or not."""

import json
import shutil
from pathlib import Path

import pytest

from deploy.app import main
from pipeline.metrics_file import METRICS_FILE, write_metrics
from pipeline.models import model_list
from pipeline.registry import bundle_of_run, promote, rollback
from ranking.task_metrics import TaskMetrics
from tests.pipeline.small_log import DAYS
from tests.pipeline.small_models import write_model


def braid(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def states(out: Path) -> list[tuple[str, str]]:
    return [(entry.date, entry.state) for entry in model_list(out).models]


def write_three(out: Path) -> None:
    for day in DAYS[:3]:
        write_model(out, day)
        promote(out, day)


def test_every_bundle_is_listed_with_what_became_of_it(tmp_path: Path) -> None:
    write_three(tmp_path)
    rollback(tmp_path)
    write_model(tmp_path, DAYS[3])

    assert states(tmp_path) == [
        (DAYS[0], "promoted"),
        (DAYS[1], "production"),
        (DAYS[2], "withdrawn"),
        (DAYS[3], "published"),
    ]


def test_a_bundle_is_listed_with_what_it_was_judged_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, DAYS[0])
    click = TaskMetrics(num_rows=900, num_positives=90, auc=0.7012, calibration=1.1)
    buy = TaskMetrics(num_rows=80, num_positives=0, auc=None)
    publish = tmp_path / DAYS[0] / "publish"
    write_metrics({"click": click}, publish / METRICS_FILE)

    (row,) = [
        line
        for line in braid(capsys, "list", "--out", str(tmp_path)).splitlines()
        if DAYS[0] in line
    ]
    assert row.split()[3:5] == ["0.7012", "1.1000"]
    write_metrics({"click": click, "buy": buy}, publish / METRICS_FILE)
    promote(tmp_path, DAYS[0])
    shutil.rmtree(tmp_path / DAYS[0])
    said = braid(capsys, "list", "--out", str(tmp_path))
    assert "click 0.7012  buy -" in said
    (entry,) = json.loads(braid(capsys, "list", "--out", str(tmp_path), "--json"))["models"]
    assert entry["metrics"]["click"] == {
        "num_rows": 900,
        "auc": 0.7012,
        "gauc": None,
        "calibration": 1.1,
    }


def test_promoted_bundles_outlive_their_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_three(tmp_path)
    for day in DAYS[:3]:
        shutil.rmtree(tmp_path / day)

    found = json.loads(braid(capsys, "list", "--out", str(tmp_path), "--json"))
    assert [Path(entry["bundle"]).is_dir() for entry in found["models"]] == [True] * 3
    promote(tmp_path, DAYS[0])
    assert states(tmp_path)[0] == (DAYS[0], "production")
    assert main(["status", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"in production: {DAYS[0]}; no run is left, only published models" in said


def test_the_latest_bundle_of_a_date_is_promoted(tmp_path: Path) -> None:
    write_model(tmp_path, DAYS[0])
    first = promote(tmp_path, DAYS[0])
    write_model(tmp_path, DAYS[0], version="-2")
    second = promote(tmp_path, DAYS[0])
    assert first.bundle != second.bundle
    assert states(tmp_path) == [(DAYS[0], "promoted"), (DAYS[0], "production")]

    shutil.rmtree(tmp_path / DAYS[0])
    rollback(tmp_path)
    assert promote(tmp_path, DAYS[0]).bundle == second.bundle


def test_the_path_that_is_served_never_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, DAYS[0])
    before = bundle_of_run(tmp_path, DAYS[0])
    promote(tmp_path, DAYS[0])
    kept = tmp_path / "models" / f"publish-train-{DAYS[0]}" / "bundle"

    assert before == tmp_path / DAYS[0] / "publish" / "bundle"
    assert bundle_of_run(tmp_path, DAYS[0]) == kept
    assert braid(capsys, "current", "--out", str(tmp_path)) == f"{kept}\n"
    found = json.loads(braid(capsys, "current", "--out", str(tmp_path), "--json"))
    assert (found["schema_version"], found["date"], found["bundle"]) == (1, DAYS[0], str(kept))


def test_nothing_in_production_ends_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, DAYS[0])

    assert main(["models", "current", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (said.out, "`braid models promote` puts one" in said.err) == ("", True)


def test_a_table_in_a_pipe_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / ("long" * 40)
    write_model(out, DAYS[0])

    said = braid(capsys, "list", "--out", str(out))
    assert str(out / DAYS[0] / "publish" / "bundle") in said

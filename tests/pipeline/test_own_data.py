"""The guide to own data: its script, its recipe and its commands, as they stand."""

import json
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deploy.app import main

pytestmark = pytest.mark.usefixtures("one_process")

GUIDE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTION = GUIDE[GUIDE.index("## Your own data") :]
HEADER = "request,user,item,time,device,clicked,category,price"


def block(kind: str) -> str:
    return str(re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[0])


def write_csv(first: int, num_days: int) -> None:
    rows = [HEADER]
    for i in range(40 * first, 40 * (first + num_days)):
        time = datetime(2026, 3, 1) + timedelta(hours=24 * i / 40)
        item = i % 7 + first
        rows.append(f"{i},u{i % 5},shoe-{item},{time},phone,{i % 3 // 2},kind {item % 2},{item}.5")
    Path("clicks.csv").write_text("\n".join(rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.yaml").write_text(block("yaml"))
    return tmp_path


def run_script() -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("python")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_script_writes_what_its_recipe_reads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert HEADER in block("")
    write_csv(0, 2)
    run_script()
    write_csv(2, 1)  # the next day
    run_script()

    items = pq.read_table(folder / "data" / "ours" / "items.parquet")
    assert items.num_rows == 9, "those of the first day are kept"
    assert main(["validate", "--recipe", "ours.yaml"]) == 0
    assert main(["data", "check", "--recipe", "ours.yaml"]) == 0
    said = capsys.readouterr().out
    assert "ok: days 2026-03-01 .. 2026-03-03, 4 files, values of 120 events" in said
    command = ["--recipe", "ours.yaml", "--date", "2026-03-02", "--out", "runs"]
    assert main(["stage", "join", *command]) == 0
    samples = pq.read_table(folder / "runs" / "2026-03-03" / "join" / "samples")
    assert samples.num_rows == 40
    assert max(map(len, samples["sequence:clicks_item"].to_pylist())) > 1


def test_ids_of_digits_alone_are_written_like_those_of_other_days(folder: Path) -> None:
    (folder / "clicks.csv").write_text(f"{HEADER}\n1,7,8,2026-03-01 08:15:02,9,1,10,59.90")

    run_script()

    for path, columns in (
        ("events/dt=2026-03-01/part-clicks.parquet", ["user_id", "item_id", "device"]),
        ("items.parquet", ["item_id", "category"]),
    ):
        (row,) = pq.ParquetFile(folder / "data" / "ours" / path).read(columns).to_pylist()
        assert set(map(type, row.values())) == {str}


@pytest.mark.integration
def test_the_recipe_trains_and_a_new_catalogue_leaves_the_day_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(0, 3)
    run_script()
    (folder / "data" / "ours" / "events" / "dt=unknown").mkdir()
    command = ["--recipe", "ours.yaml", "--date", "2026-03-02", "--out", "runs"]
    command += ["--set", "cluster.num_workers=1", "--set", "gate.min_auc=0"]
    command += ["--set", "gate.calibration=[0.01, 100]"]
    command += ["--set", "gate.min_rows=1", "--set", "gate.min_rows_per_class=1"]
    assert main(["run", *command]) == 0
    directory = folder / "runs" / "2026-03-02"
    assert (directory / "report.html").exists()
    summary = json.loads((directory / "summary.json").read_text())
    (warning,) = summary["warnings"]
    assert "partitions that are no days and are left out: dt=unknown" in warning
    assert warning in capsys.readouterr().out.replace("\n", ""), "before it trained"

    items = folder / "data" / "ours" / "items.parquet"
    pq.write_table(pq.read_table(items).slice(1), items)
    assert main(["run", *command]) == 0
    said = capsys.readouterr().out
    assert said.count("current") == len(summary["stages"]) + 2, "of two spans"
    assert main(["status", "--out", "runs"]) == 0
    assert "stale" not in capsys.readouterr().out
    assert main(["run", *command, "--refresh-catalogue"]) == 2
    assert "rows are of items without a row in" in capsys.readouterr().err

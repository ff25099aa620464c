"""Every fault a user can cause, through the command line: one sentence, exit 2, nothing written."""

import errno
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from deploy.app import main
from pipeline import run
from pipeline.lock import exclusive

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_process")]

NUM_ROWS = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound log of two days; its items have images."""
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (0, 1):
        write_day(root, day, [[event(day, 1 + i % 5, 60 * i) for i in range(NUM_ROWS)]])
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    items = pq.read_table(root / "items.parquet")
    images = pa.array([picture.getvalue()] * items.num_rows, pa.binary())
    pq.write_table(items.append_column("image", images), root / "items.parquet")
    return root


def braid_run(
    root: Path, capsys: pytest.CaptureFixture[str], *overrides: str, stage: str = "ingest"
) -> str:
    """What `braid run` says on stderr when it refuses; checks that `stage` leaves no artifact."""
    recipe = make_recipe(root, max_quarantined_share=0.01).model_dump(mode="json")
    path = root.parent / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    out = root.parent / "runs"
    sets = [f"--set={override}" for override in overrides]
    capsys.readouterr()

    code = main(["run", "--recipe", str(path), "--date", DAYS[0], "--out", str(out), *sets])

    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert list(out.rglob(f"{stage}/manifest.json")) == []
    partial = [path for path in out.rglob("*") if path.is_dir() and path.name.startswith(".")]
    assert [path for folder in partial for path in folder.rglob("*") if path.is_file()] == []
    return sentence


def change_events(root: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """Rewrite the first day's file."""
    (path,) = (root / "events" / f"dt={DAYS[0]}").glob("*.parquet")
    pq.write_table(change(pq.read_table(path)), path)
    return path


def replace(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def test_unknown_key_suggests_the_nearest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = braid_run(root, capsys, "ranking.trainer.epoch=2")

    assert "ranking.trainer.epoch: unknown key; did you mean 'epochs'?" in said


def test_a_recipe_of_the_marketplace_on_data_of_ones_own(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = braid_run(root, capsys, "data.synthetic={num_days: 2}")

    assert f"data.root={root} holds data" in said
    assert "--set data.synthetic=null" in said
    assert sorted(path.name for path in root.iterdir()) == [
        "events",
        "items.parquet",
        "users.parquet",
    ]


def test_missing_column(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change_events(root, lambda table: table.drop_columns(["device"]))

    said = braid_run(root, capsys)

    assert f"{path} lacks the columns ['device']" in said
    assert "write them or correct" in said


def test_wrong_type(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change_events(
        root, lambda table: replace(table, "price", table["price"].cast(pa.string()))
    )

    said = braid_run(root, capsys)

    assert f"{path}: column 'price' has type string" in said
    assert "cast it to float32" in said


def test_faulty_rows_beyond_the_limit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults: dict[str, Any] = {"user_id": None, "price": float("nan"), "click": 2, "item_id": 99}

    def one_row_each(table: pa.Table) -> pa.Table:
        for row, (name, value) in enumerate(faults.items()):
            values = table[name].to_pylist()
            values[row] = value
            table = replace(table, name, pa.array(values, table[name].type))
        return table

    path = change_events(root, one_row_each)

    said = braid_run(root, capsys)

    assert f"4 of {NUM_ROWS} events of {DAYS[0]} break the data contract" in said
    for reason in (
        "1 x null user_id",
        "1 x NaN or inf in dense column price",
        "1 x label click not 0, 1 or null",
        "1 x item_id without catalogue row",
    ):
        assert reason in said
    assert f"first in {path}" in said
    assert "correct the log or raise the limit" in said


def test_truncated_file(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = change_events(root, lambda table: table)
    path.write_bytes(path.read_bytes()[:-20])

    said = braid_run(root, capsys)

    assert f"{path} is not a complete Parquet file" in said
    assert "write or copy it again" in said


def test_empty_day(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_events(root, lambda table: table.slice(0, 0))

    said = braid_run(root, capsys)

    assert f"dt={DAYS[0]} is empty" in said
    assert "deliver the day's events or choose another date" in said


def test_unreadable_images_that_towers_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = pq.read_table(root / "items.parquet")
    first = pc.equal(items["item_id"], 1)
    broken = pc.if_else(first, pa.scalar(b"no picture"), items["image"])
    pq.write_table(replace(items, "image", broken), root / "items.parquet")

    said = braid_run(root, capsys, "content={image: {}, dim: 8}", stage="content")

    assert "the images of 1 of 4 items cannot be read" in said
    assert "among them that of item_id 1" in said
    assert "repair them, write null, or raise the limit" in said


def test_full_disk(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "samples/part.parquet")

    monkeypatch.setattr(run, "ingest", full)

    said = braid_run(root, capsys)

    assert "the disk is full while writing samples/part.parquet" in said
    assert "free some space" in said


def test_directory_in_use(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exclusive(root.parent / "runs", "braid run --date 2024-01-01"):
        said = braid_run(root, capsys)

    assert "is in use by `braid run --date 2024-01-01`" in said
    assert "wait for it or choose another --out" in said


def test_published_artifacts_survive_a_failed_run(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root.parent / "small.yaml"
    path.write_text(yaml.safe_dump(make_recipe(root).model_dump(mode="json")))
    out = root.parent / "runs"
    command = ["stage", "join", "--recipe", str(path), "--date", DAYS[0], "--out", str(out)]
    assert main(command) == 0
    before = {p: p.read_bytes() for p in out.rglob("*.parquet")}
    shutil.rmtree(root / "events" / f"dt={DAYS[1]}")
    change_events(root, lambda table: table.drop_columns(["device"]))

    assert main(command) == 2

    capsys.readouterr()
    assert {p: p.read_bytes() for p in out.rglob("*.parquet")} == before

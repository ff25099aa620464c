"""A small log, two days of which were trained and published, and requests for it."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deploy.app import main
from tests.one_process import in_one_process
from tests.pipeline.small_log import DAYS, write_log_to_run

Row = dict[str, Any]


def publish_days(folder: Path) -> Path:
    """The output directory of two published days; that of the second one is in production."""
    recipe, out = write_log_to_run(folder, num_days=3), folder / "runs"
    days = ["--from", DAYS[0], "--to", DAYS[1]]
    with in_one_process():
        assert main(["backfill", "--recipe", str(recipe), *days, "--out", str(out)]) == 0
    return out


def ingested(out: Path) -> list[Row]:
    """Events of the last day, with their histories."""
    paths = sorted((out / DAYS[2] / "ingest" / "events").glob("dt=*/*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def request_of(row: Row, candidates: list[int] | None = None) -> Row:
    """What a caller would have asked about an event."""
    return {
        "user_id": row["user_id"],
        "candidates": candidates or [row["item_id"]],
        "timestamp": row["timestamp"],
        "context": {"device": "phone", "price": row["price"]},
        "histories": {
            "clicks": {
                name: row[f"history:clicks:{name}"] for name in ("item_id", "timestamp", "stars")
            },
            "seen": {name: row[f"history:seen:{name}"] for name in ("item_id", "timestamp")},
        },
    }

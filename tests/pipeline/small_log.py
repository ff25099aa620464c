"""A small event log with its recipe, and a serial stand-in for Ray tasks, for tests."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.config import Recipe
from pipeline.samples.contract import MS_PER_DAY

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"]
TIMESTAMP = pa.timestamp("ms", tz="UTC")
START_MS = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp() * 1000)
SCHEMA = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("device", pa.string()),
        ("price", pa.float64()),
        ("stars", pa.int64()),
        ("click", pa.int8()),
    ]
)

Row = dict[str, Any]


def event(day: int, user: int, second: int, **columns: Any) -> Row:
    """One sound event; any column can be replaced."""
    time = START_MS + day * MS_PER_DAY + second * 1000
    row = {"request_id": second, "user_id": user, "item_id": 1, "timestamp": time}
    return {**row, "device": "phone", "price": 1.0, "stars": 3, "click": 1, **columns}


def write_day(root: Path, day: int, files: Sequence[Sequence[Row]]) -> None:
    """Write the events of a day, one file for each sequence of rows."""
    folder = root / "events" / f"dt={DAYS[day]}"
    folder.mkdir(parents=True)
    for i, rows in enumerate(files):
        columns = {
            name: pa.array([row[name] for row in rows], SCHEMA.field(name).type)
            for name in SCHEMA.names
        }
        pq.write_table(pa.table(columns), folder / f"part-{i:05d}.parquet", row_group_size=4)


def write_catalogue(root: Path, num_items: int = 4, num_users: int = 5) -> None:
    """Items 1 .. num_items and users 1 .. num_users; item 2 and user 2 have nulls."""
    root.mkdir(parents=True, exist_ok=True)
    items = range(1, num_items + 1)
    pq.write_table(
        pa.table(
            {
                "item_id": pa.array(items, pa.int64()),
                "category": [None if i == 2 else f"category {i}" for i in items],
                "tags": pa.array(
                    [None if i == 2 else [f"tag {t}" for t in range(i)] for i in items],
                    pa.list_(pa.string()),
                ),
                "weight": pa.array([None if i == 2 else 10.0 * i for i in items], pa.float64()),
            }
        ),
        root / "items.parquet",
    )
    users = range(1, num_users + 1)
    pq.write_table(
        pa.table({"user_id": users, "country": [None if u == 2 else f"land {u}" for u in users]}),
        root / "users.parquet",
    )


def write_days_to_train_on(root: Path, num_days: int) -> None:
    """A catalogue and days of 90 events with both labels."""
    write_catalogue(root)
    for day in range(num_days):
        rows = [
            event(
                day, 1 + k % 5, 60 * k, item_id=1 + (k + day) % 4, click=int((7 * k + day) % 3 == 0)
            )
            for k in range(90)
        ]
        write_day(root, day, [rows])


def make_recipe(root: Path, **changes: Any) -> Recipe:
    """A recipe that reads every column of the small log."""
    tables = ("user", "item", "category", "country", "tag", "device", "stars", "gap")
    data = {"root": root, "user_buckets": 2, "max_quarantined_share": 0.5}
    recipe: dict[str, Any] = {
        "name": "small",
        "features": {
            "tables": [{"name": name, "num_embeddings": 100} for name in tables],
            "sparse": [
                {"name": "user_id", "table": "user"},
                {"name": "item_id", "table": "item", "source": "items"},
                {"name": "category", "table": "category", "source": "items"},
                {"name": "tags", "table": "tag", "source": "items", "max_length": 2},
                {"name": "country", "table": "country", "source": "users"},
                {"name": "device", "table": "device"},
            ],
            "dense": [
                {"name": "price", "transform": "log1p", "mean": 0.5, "std": 2.0},
                {"name": "weight", "source": "items", "missing": -1.0},
            ],
            "histories": [
                {"name": "clicks", "label": "click", "max_length": 3},
                {"name": "seen", "max_length": 2},
            ],
            "sequences": [
                {"name": "past_item", "history": "clicks", "table": "item", "column": "item_id"},
                {
                    "name": "past_category",
                    "history": "clicks",
                    "table": "category",
                    "column": "category",
                },
                {
                    "name": "past_stars",
                    "history": "clicks",
                    "table": "stars",
                    "source": "events",
                    "column": "stars",
                },
                {"name": "past_gap", "history": "clicks", "table": "gap", "source": "gap"},
                {"name": "seen_item", "history": "seen", "table": "item", "column": "item_id"},
            ],
        },
        "ranking": {"tasks": [{"name": "click"}]},
        "gate": {"task": "click", "min_rows": 1, "min_rows_per_class": 1},
    }
    return Recipe.model_validate({**recipe, "data": {**data, **changes}})


def write_log_to_run(folder: Path, num_days: int, **gate: Any) -> Path:
    """Days to train on, and `small.yaml`: a recipe of one rank whose gate lets models through."""
    write_days_to_train_on(folder / "data", num_days)
    recipe = make_recipe(folder / "data").model_dump(mode="json")
    recipe["cluster"]["num_workers"] = 1
    recipe["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0], **gate}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_here(
    run: Callable[[Any, Any], Any], tasks: Sequence[Any], shared: Any, rows: Sequence[int]
) -> Iterator[Any]:
    """`pipeline.tasks.stream_tasks` in this process, the last task first."""
    assert len(rows) == len(tasks)
    for task in reversed(list(tasks)):
        yield run(task, shared)


def file_bytes(directory: Path) -> dict[str, bytes]:
    """All files under a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def day_name(timestamp_ms: int) -> str:
    """The dt day of a timestamp."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=timestamp_ms)).strftime(
        "%Y-%m-%d"
    )

"""The positives of a training period, bucket of users by bucket, from ingest artifacts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.feature_schema import HistoryConfig
from pipeline.config import HeldOutItems
from pipeline.samples.buckets import bucket_file
from pipeline.samples.columns import history_column
from pipeline.samples.contract import open_parquet
from pipeline.samples.held_out import is_held_out
from pipeline.samples.ingest import STATE_FILE, IngestState
from pipeline.samples.partition import user_buckets

ROWS_PER_BUCKET = 1 << 20


@dataclass(frozen=True)
class UserBuckets:
    """Users in buckets whose events of the whole period fit into memory."""

    number: int
    of_artifacts: dict[Path, int]
    """Number of user buckets of each ingest artifact."""


@dataclass(frozen=True)
class PairSource:
    """Events to mine: the training period and nothing behind it."""

    artifacts: tuple[Path, ...]
    """Ingest artifacts, oldest first."""
    days: tuple[str, ...]
    """Days of the training period; events of others are not read."""
    history: HistoryConfig
    """Positives are the events that enter it; its lists hold the earlier positives."""
    held_out: HeldOutItems | None = None
    """Items kept from training: no pair holds them."""
    share_positive: float = 1.0
    """Of the events, about: how many buckets of users positives need follows from it."""

    @property
    def past(self) -> str:
        """Column of an event with the items of the earlier positives."""
        return history_column(self.history.name, "item_id")

    def split_users(self, num_events: int) -> UserBuckets:
        """Buckets to read the period in, which has `num_events`.

        Artifacts of a day each have few buckets, however many days there are; with more of them
        every file is read for several.
        """
        found = {
            path: IngestState.model_validate_json((path / STATE_FILE).read_text()).num_buckets
            for path in self.artifacts
        }
        number = max(found.values())
        while number * ROWS_PER_BUCKET < num_events * self.share_positive:
            number *= 2
        return UserBuckets(number, found)

    def num_events(self) -> int:
        """Events of the period, positive or not."""
        files = [
            file
            for path in self.artifacts
            for day in self.days
            for file in (path / "events" / f"dt={day}").glob("*.parquet")
        ]
        return sum(pq.read_metadata(file).num_rows for file in files)


def read_positives(
    source: PairSource, bucket: int, buckets: UserBuckets, *, with_past: bool
) -> pa.Table:
    """All positives of one bucket's users: `user_id`, `item_id` and, if asked for, `source.past`.

    Args:
        source: says which events.
        bucket: one of `buckets`.
        buckets: of the source.
        with_past: read the earlier positives of each, too.
    """
    columns = ["user_id", "item_id", *([source.past] if with_past else [])]
    tables = []
    for path, number in buckets.of_artifacts.items():
        # bucket = h mod n and other = h mod m hold for one h only if they agree modulo gcd(n, m).
        step = gcd(buckets.number, number)
        for day in source.days:
            for other in range(bucket % step, number, step):
                file = path / "events" / f"dt={day}" / bucket_file(other)
                if file.exists():
                    events = _positives(file, columns, source.history.label)
                    tables.append(events.filter(_are_in(bucket, buckets, source, events)))
    if not tables:
        types = (pa.int64(), pa.int64(), pa.list_(pa.int64()))
        return pa.schema(list(zip(columns, types, strict=False))).empty_table()
    return pa.concat_tables(tables).combine_chunks()


def _are_in(
    bucket: int, buckets: UserBuckets, source: PairSource, events: pa.Table
) -> pa.BooleanArray:
    are_ours = user_buckets(events["user_id"].to_numpy(), buckets.number) == bucket
    if source.held_out is not None:
        are_ours &= ~is_held_out(events["item_id"].to_numpy(), source.held_out)
    return pa.array(are_ours)


def _positives(path: Path, columns: Sequence[str], label: str | None) -> pa.Table:
    with open_parquet(path) as file:
        events = file.read([*columns, *([label] if label else [])], use_threads=False)
    if label is None:
        return events
    return events.filter(pc.fill_null(pc.equal(events[label], 1), False)).drop_columns(label)

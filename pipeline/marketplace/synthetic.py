"""Writes the synthetic marketplace as a dataset of the data contract, streamed day by day.

Events carry `oracle_click`, the true probability that `click` was drawn with.
"""

# Shapes: R requests, C candidates of a request, D taste dimensions.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.raw_ids import Int64Array
from pipeline.config import Recipe, SyntheticConfig
from pipeline.console import Reporter
from pipeline.days import parse_day
from pipeline.marketplace.counter_random import FloatArray
from pipeline.marketplace.market import CALIBRATION_ROWS, DEVICES, Marketplace, sigmoid
from pipeline.marketplace.views import audience, catalogue
from pipeline.recipe import apply_override
from pipeline.samples.dataset import TIMESTAMP, DayWriter, is_written, writing_dataset

RECEIPT = "synthetic.json"
GENERATOR_VERSION = 1
"""Changes whenever the same config would give other data."""

MS_PER_DAY = 86_400_000
MS_PER_HOUR = 3_600_000
CHUNK_EVENTS = 131_072
CHUNK_ITEMS = 2_048
CHUNK_USERS = 262_144
OWN_DEVICE_SHARE = 0.8
BUSY_USERS, BUSY_SHARE = 0.2, 0.4
"""A fifth of the users sends 0.4 of the requests alone, and its part of the rest."""
REDRAWS = 20

Progress = Callable[[int, int], None]

EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", TIMESTAMP),
        ("hour", pa.int8()),
        ("device", pa.string()),
        ("position", pa.int16()),
        ("click", pa.int8()),
        ("oracle_click", pa.float32()),
    ]
)


def synthetic_config(sizes: Mapping[str, Any], overrides: Sequence[str] = ()) -> SyntheticConfig:
    """The marketplace's configuration from values and `key=value` texts.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    values: dict[str, Any] = dict(sizes)
    for override in overrides:
        apply_override(values, override)
    try:
        return SyntheticConfig.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'marketplace'}: {fault['msg']}; "
            f"got {fault['input']!r}"
            for fault in error.errors()
        ]
        allowed = ", ".join(SyntheticConfig.model_fields)
        raise UserError(f"synthetic marketplace: {'; '.join(faults)} (keys: {allowed})") from error


class MarketplaceReceipt(StrictConfig):
    """`synthetic.json`; version 1."""

    schema_version: Literal[1] = 1
    version: int = GENERATOR_VERSION
    """Of the generator."""
    config: SyntheticConfig


def generate(config: SyntheticConfig, root: Path, *, progress: Progress | None = None) -> None:
    """Write the marketplace to `root`; nothing happens if it is there already.

    Args:
        config: Truth, size and seed; equal configs give equal files.
        root: Directory to create.
        progress: Called with rows written so far (items and events) and all rows.

    Raises:
        UserError: `root` holds something else.
    """
    receipt = MarketplaceReceipt(config=config)
    if is_written(root, RECEIPT, receipt):
        return
    market = Marketplace(config)
    rows = _RowCount(market.num_items_ever + config.num_days * config.events_per_day, progress)
    with writing_dataset(root, RECEIPT, receipt) as scratch:
        if scratch is None:  # another run has just generated it
            return
        _write_users(market, scratch)
        _write_items(market, scratch, rows)
        for day in range(config.num_days):
            name = (config.first_day + timedelta(days=day)).isoformat()
            start_ms = (config.first_day - _EPOCH).days * MS_PER_DAY + day * MS_PER_DAY
            with DayWriter(scratch, name, EVENTS) as writer:
                for events in day_events(market, day, start_ms):
                    writer.write(events)
                    rows.add(len(events["item_id"]))


def day_events(market: Marketplace, day: int, start_ms: int) -> Iterator[dict[str, Any]]:
    """Events of one day in order of time, some requests at a time.

    Args:
        market: The truth.
        day: Counted from the first one.
        start_ms: The day's beginning, milliseconds since the epoch.
    """
    config = market.config
    shop = _OpenDay(market, day)
    num_requests = -(-config.events_per_day // config.candidates_per_request)
    per_chunk = max(1, CHUNK_EVENTS // config.candidates_per_request)
    left = config.events_per_day
    for chunk, first in enumerate(range(0, num_requests, per_chunk)):
        requests = np.arange(first, min(first + per_chunk, num_requests))
        rng = np.random.default_rng([config.seed, day, chunk])
        events = shop.serve(requests, num_requests, rng)
        events["timestamp"] = pa.array(events["timestamp"] + start_ms).cast(TIMESTAMP)
        yield {name: column[:left] for name, column in events.items()}
        left -= len(events["item_id"])


@dataclass
class _RowCount:
    total: int
    report: Progress | None
    done: int = 0

    def add(self, rows: int) -> None:
        self.done += rows
        if self.report is not None:
            self.report(self.done, self.total)


class _OpenDay:
    """The marketplace on one day: which items are shown, and the level of the click rate."""

    def __init__(self, market: Marketplace, day: int) -> None:
        self.market = market
        self.day = day
        first, last = market.alive(day)
        self.items = np.arange(first, last)
        self.latents = market.latents(self.items).astype(np.float32)
        self.own = market.own_appeal(self.items, day).astype(np.float32)
        self.exposure = np.cumsum(market.exposure(self.items, day))
        self.intercept = 0.0
        num_requests = -(-CALIBRATION_ROWS // market.config.candidates_per_request)
        rng = np.random.default_rng([market.config.seed, day, 1 << 32])
        events = self.serve(np.arange(num_requests), num_requests, rng)
        odds = events["oracle_click"].astype(np.float64)
        self.intercept = market.intercept(np.log(odds) - np.log1p(-odds))

    def serve(
        self, requests: Int64Array, num_requests: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Columns of the events of some of a day's requests; times count from midnight."""
        market, num_candidates = self.market, self.market.config.candidates_per_request
        slot = MS_PER_DAY // num_requests
        time_R = requests * slot + rng.integers(slot, size=len(requests))
        hour_R = time_R // MS_PER_HOUR
        user_R = self._visitors(len(requests), rng)
        stray = rng.random(len(requests)) > OWN_DEVICE_SHARE
        device_R = np.where(
            stray, rng.integers(len(DEVICES), size=len(requests)), market.own_device(user_R)
        )
        shown_RC = self._candidates(len(requests), rng)
        logits_RC = (
            self.intercept
            + market.request_logits(user_R, device_R, hour_R)[:, None]
            + market.position_logits()[None, :]
            + market.item_logits(
                market.tastes(user_R, self.day),
                self.latents[shown_RC],
                self.own[shown_RC],
                self.day,
            )
        )
        oracle = sigmoid(logits_RC).astype(np.float32).ravel()
        return {
            "request_id": np.repeat(self.day * num_requests + requests, num_candidates),
            "user_id": np.repeat(user_R, num_candidates),
            "item_id": self.items[shown_RC].ravel(),
            "timestamp": np.repeat(time_R, num_candidates),
            "hour": np.repeat(hour_R, num_candidates).astype(np.int8),
            "device": np.repeat(np.array(DEVICES)[device_R], num_candidates),
            "position": np.tile(np.arange(num_candidates, dtype=np.int16), len(requests)),
            "click": (rng.random(oracle.shape) < oracle).astype(np.int8),
            "oracle_click": oracle,
        }

    def _visitors(self, num_requests: int, rng: np.random.Generator) -> Int64Array:
        """Users who send the requests: those who have joined, some far more active than others."""
        num_users = self.market.config.num_users
        users = np.full(num_requests, -1, np.int64)
        todo = np.arange(num_requests)
        for _ in range(REDRAWS):
            # Low ids are the busy users. Tastes do not depend on the id: this tells nothing else.
            reach = np.where(rng.random(len(todo)) < BUSY_SHARE, BUSY_USERS, 1.0)
            drawn = (rng.random(len(todo)) * reach * num_users).astype(np.int64)
            users[todo] = drawn
            todo = todo[self.market.joined(drawn) > self.day]
            if not len(todo):
                break
        return users

    def _candidates(self, num_requests: int, rng: np.random.Generator) -> Int64Array:
        """Places in `self.items` of what is shown, (R, C); no item twice in a request."""
        shape = (num_requests, self.market.config.candidates_per_request)
        shown_RC = self._draw(rng.random(shape))
        for _ in range(REDRAWS):
            again = _repeats(shown_RC)
            if not again.any():
                return shown_RC
            shown_RC[again] = self._draw(rng.random(int(again.sum())))
        # Few items, many places: draw the rows that are left without replacement, exactly.
        rows = _repeats(shown_RC).any(axis=1)
        weights = np.diff(self.exposure, prepend=0.0)
        keys = -np.log(rng.random((int(rows.sum()), len(weights)))) / weights
        shown_RC[rows] = np.argsort(keys, axis=1)[:, : shape[1]]
        return shown_RC

    def _draw(self, uniform: FloatArray) -> Int64Array:
        found = np.searchsorted(self.exposure, uniform * self.exposure[-1], side="right")
        return np.minimum(found, len(self.items) - 1)


def _repeats(ids_RC: Int64Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True where an id already stands further left in its row."""
    order = np.argsort(ids_RC, axis=1, kind="stable")
    ranked = np.take_along_axis(ids_RC, order, axis=1)
    repeats = np.zeros(ids_RC.shape, bool)
    np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeats


def _write_users(market: Marketplace, root: Path) -> None:
    _write_chunks(
        root / "users.parquet",
        (audience(market, ids) for ids in _chunks(market.config.num_users, CHUNK_USERS)),
    )


def _write_items(market: Marketplace, root: Path, rows: _RowCount) -> None:
    def tables() -> Iterator[pa.Table]:
        for ids in _chunks(market.num_items_ever, CHUNK_ITEMS):
            yield catalogue(market, ids)
            rows.add(len(ids))

    _write_chunks(root / "items.parquet", tables())


def _write_chunks(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _chunks(count: int, size: int) -> Iterator[Int64Array]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


_EPOCH = parse_day("1970-01-01", "epoch")


def ensure_data(recipe: Recipe, reporter: Reporter) -> None:
    """Generate the synthetic marketplace where the recipe asks for it and it is not there.

    Raises:
        UserError: another dataset is there.
    """
    root = recipe.data.root
    if recipe.data.synthetic is None:
        return
    if root.is_dir() and any(root.iterdir()) and not (root / RECEIPT).exists():
        raise UserError(
            f"data.root={root} holds data that is not the synthetic marketplace for which "
            "data.synthetic asks; if it is your own, delete data.synthetic from the recipe (or "
            "--set data.synthetic=null), else choose another data.root"
        )
    with reporter.stage("generate", unit="events"):
        generate(recipe.data.synthetic, root, progress=reporter.advance)

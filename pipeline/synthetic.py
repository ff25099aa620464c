"""The synthetic marketplace: an event log whose click probabilities are known.

Writes events/, items.parquet and users.parquet. Users and items have latents near topics. The
click probability of an impression is

    sigmoid(intercept + scale * (sqrt(c) * visible + sqrt(1 - c) * hidden) + user bias + position)

where `visible` mixes the match of user and item latents with a quality that the item's text and
image show, `hidden` is a quality that only clicks reveal, and c is `content_share`. Items are born
and die every day, tastes and hidden qualities drift. `oracle_click` holds the probability itself.
`like` is observed on clicked rows only.

Everything of one day derives from (seed, day), so a longer marketplace begins with a shorter one.
"""

# Shapes: U users, I items, T topics, D taste dimensions, R requests, C candidates of a request.

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import SyntheticConfig
from pipeline.contract import MS_PER_DAY, epoch_day
from pipeline.dataset import EventWriter, new_dataset
from pipeline.showcase import MAX_TOPICS, TOPIC_WORDS, FloatArray, describe, render

IntArray = np.ndarray[Any, np.dtype[np.int64]]

ROWS_PER_CHUNK = 1 << 18
_ITEMS_PER_CHUNK = 2_048

# Parts of the visible appeal; their squares sum to 1.
_TASTE, _QUALITY = 0.8, 0.6
_SCALE = 1.25
_USER_BIAS = 0.3
_POSITION = 0.06
_ITEM_SPREAD = 0.45
"""Distance of items from the centre of their topic."""
_WRONG_CATEGORY_SHARE = 0.15
_EXPOSURE_SPREAD = 0.5
_NO_IMAGE_SHARE = 0.03
_COUNTRIES = ("US", "DE", "IN", "BR", "JP", "GB", "FR", "NG")
_DEVICES = ("phone", "tablet", "desktop")

_EVENTS = pa.schema(
    [
        ("request_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("position", pa.int8()),
        ("hour", pa.int8()),
        ("device", pa.dictionary(pa.int8(), pa.string())),
        ("click", pa.int8()),
        ("like", pa.int8()),
        ("oracle_click", pa.float32()),
        ("oracle_like", pa.float32()),
    ]
)


def generate(
    config: SyntheticConfig, root: Path, progress: Callable[[int, int], None] | None = None
) -> bool:
    """Write the marketplace into `root`; memory holds the latents and one chunk of events.

    Args:
        config: size, truth and seed.
        root: the data root; it appears when it is complete.
        progress: called with events done and events in total.

    Returns:
        False if `root` holds this very marketplace already.

    Raises:
        UserError: `root` holds something else.
    """
    made_by = {"command": "synth", **config.model_dump(mode="json")}
    with new_dataset(root, made_by) as target:
        if target is None:
            return False
        market = Marketplace(config)
        _write_items(market, target)
        _write_users(market, target)
        total, done = config.num_days * config.events_per_day, 0
        writer = EventWriter(target, _EVENTS)
        for day in range(config.num_days):
            name = (date.fromisoformat(config.first_day) + timedelta(days=day)).isoformat()
            for events in market.day(day):
                writer.write(name, events)
                done += events.num_rows
                if progress:
                    progress(done, total)
        writer.close()
    return True


def spread_ids(indices: IntArray) -> IntArray:
    """Distinct ids below 2**31 that tell nothing of the order of birth."""
    return (indices + 1) * 2_654_435_761 % (1 << 31)


@dataclass
class _Items:
    """All items that ever live; columns of the truth."""

    birth_I: IntArray
    death_I: IntArray
    topic_I: IntArray
    latent_ID: FloatArray
    quality_I: FloatArray
    hidden_I: FloatArray
    log_exposure_I: FloatArray
    """In units of `_EXPOSURE_SPREAD`."""


class Marketplace:
    """The truth, and the days drawn from it. Days must be drawn in order: tastes drift."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        rng = self.rng(0)
        self.num_topics = min(2 * config.taste_dim, MAX_TOPICS)
        centres = rng.normal(size=(self.num_topics, config.taste_dim))
        self.centres_TD = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        self._draw_users(rng)
        self._draw_items()
        share = config.content_share
        self._visible, self._hidden = _SCALE * np.sqrt(share), _SCALE * np.sqrt(1 - share)
        self._intercept = _intercept(config.base_rate, np.hypot(_SCALE, _USER_BIAS))

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator of its own for every purpose (and day)."""
        return np.random.default_rng([self.config.seed, *stream])

    def _draw_users(self, rng: np.random.Generator) -> None:
        count, dim = self.config.num_users, self.config.taste_dim
        # A user likes two topics, the first one more.
        self.user_topics_U2 = rng.integers(0, self.num_topics, (count, 2))
        first, second = self.centres_TD[self.user_topics_U2].transpose(1, 0, 2)
        self.tastes_UD = _unit(
            first + 0.6 * second + rng.normal(0, 0.3 / np.sqrt(dim), (count, dim))
        )
        self.bias_U = rng.normal(0, _USER_BIAS, count)
        self.activity_U = np.cumsum(rng.gamma(2.0, 1.0, count))

    def _draw_items(self) -> None:
        config = self.config
        births = round(config.num_items * config.births_per_day)
        cohorts = []
        for day in range(config.num_days):
            rng = self.rng(1, day)
            size = config.num_items if day == 0 else births
            topic = rng.integers(0, self.num_topics, size)
            noise = rng.normal(
                0, _ITEM_SPREAD / np.sqrt(config.taste_dim), (size, config.taste_dim)
            )
            cohorts.append(
                _Items(
                    birth_I=np.full(size, day),
                    death_I=np.full(size, config.num_days),
                    topic_I=topic,
                    latent_ID=_unit(self.centres_TD[topic] + noise),
                    quality_I=rng.normal(size=size),
                    hidden_I=rng.normal(size=size),
                    log_exposure_I=rng.normal(size=size),
                )
            )
        self.items = _Items(
            *(
                np.concatenate([getattr(c, name) for c in cohorts])
                for name in _Items.__annotations__
            )
        )
        for day in range(1, config.num_days):
            alive = np.flatnonzero((self.items.birth_I < day) & (self.items.death_I > day))
            dead = self.rng(2, day).choice(alive, births, replace=False)
            self.items.death_I[dead] = day
        # The match of a random user and item has mean 0 and variance 1 on the scale of the logit.
        rng = self.rng(3)
        users = rng.integers(0, config.num_users, 20_000)
        match = (
            self.tastes_UD[users]
            * self.items.latent_ID[: config.num_items][rng.integers(0, config.num_items, 20_000)]
        ).sum(axis=1)
        self._match_mean, self._match_std = float(match.mean()), float(match.std())

    def day(self, day: int) -> Iterator[pa.Table]:
        """The events of a day, by time, in chunks of at most `ROWS_PER_CHUNK` rows."""
        config = self.config
        if day > 0:
            self._drift(day)
        alive = np.flatnonzero((self.items.birth_I <= day) & (self.items.death_I > day))
        alive = self.rng(5, day).permutation(alive)
        requests = max(config.events_per_day // config.candidates_per_request, 1)
        per_chunk = max(ROWS_PER_CHUNK // config.candidates_per_request, 1)
        for first in range(0, requests, per_chunk):
            request_R = np.arange(first, min(first + per_chunk, requests))
            rng = self.rng(6, day, first)
            # Every request has a slice of the day for itself: no two share a millisecond.
            width = MS_PER_DAY // requests
            start = (epoch_day(config.first_day) + day) * MS_PER_DAY
            time_R = start + request_R * width + rng.integers(0, width, len(request_R))
            yield self._requests(day * requests + request_R, time_R, alive, rng)

    def _drift(self, day: int) -> None:
        step = self.config.drift
        keep = 1 / np.sqrt(1 + step**2)  # the variance stays 1
        noise = self.rng(4, day).normal(size=self.tastes_UD.shape) / np.sqrt(self.config.taste_dim)
        self.tastes_UD = _unit(self.tastes_UD + step * noise)
        # Each its own stream, in order of birth: later births do not change earlier items.
        for stream, values_I in ((7, self.items.hidden_I), (8, self.items.log_exposure_I)):
            values_I[:] = keep * (
                values_I + step * self.rng(stream, day).normal(size=len(values_I))
            )

    def _requests(
        self, request_R: IntArray, time_R: IntArray, alive: IntArray, rng: np.random.Generator
    ) -> pa.Table:
        shape = (len(request_R), self.config.candidates_per_request)
        activity = rng.random(shape[0]) * self.activity_U[-1]
        user_R = np.searchsorted(self.activity_U, activity, side="right")
        exposure = np.exp(_EXPOSURE_SPREAD * self.items.log_exposure_I[alive])
        item_RC = _candidates(exposure, shape, rng)
        item_RC = rng.permuted(alive[item_RC], axis=1)
        probs_RC = self._click_probs(user_R, item_RC)
        click = (rng.random(shape) < probs_RC).reshape(-1)
        like_probs = self._like_probs(user_R, item_RC)
        like = (rng.random(shape) < like_probs).reshape(-1)
        rows = shape[1]
        hour_R = time_R % MS_PER_DAY // 3_600_000
        device_R = rng.integers(0, len(_DEVICES), shape[0])
        device = pa.DictionaryArray.from_arrays(
            pa.array(np.repeat(device_R, rows).astype(np.int8)), pa.array(_DEVICES)
        )
        columns = [
            np.repeat(request_R, rows),
            np.repeat(spread_ids(user_R), rows),
            spread_ids(item_RC.reshape(-1)),
            pa.array(np.repeat(time_R, rows), _EVENTS.field("timestamp").type),
            np.tile(np.arange(rows, dtype=np.int8), shape[0]),
            np.repeat(hour_R.astype(np.int8), rows),
            device,
            click.astype(np.int8),
            pa.array(like.astype(np.int8), mask=~click),
            probs_RC.reshape(-1).astype(np.float32),
            pa.array(like_probs.reshape(-1).astype(np.float32), mask=~click),
        ]
        return pa.table(dict(zip(_EVENTS.names, columns, strict=True)))

    def _visible_appeal(self, user_R: IntArray, item_RC: IntArray) -> FloatArray:
        match_RC = np.einsum("rd,rcd->rc", self.tastes_UD[user_R], self.items.latent_ID[item_RC])
        match_RC = (match_RC - self._match_mean) / self._match_std
        return np.asarray(_TASTE * match_RC + _QUALITY * self.items.quality_I[item_RC])

    def _click_probs(self, user_R: IntArray, item_RC: IntArray) -> FloatArray:
        logits_RC = (
            self._intercept
            + self._visible * self._visible_appeal(user_R, item_RC)
            + self._hidden * self.items.hidden_I[item_RC]
            + self.bias_U[user_R, None]
            - _POSITION * (np.arange(item_RC.shape[1]) - (item_RC.shape[1] - 1) / 2)
        )
        return _sigmoid(logits_RC)

    def _like_probs(self, user_R: IntArray, item_RC: IntArray) -> FloatArray:
        hidden_RC = self.items.hidden_I[item_RC]
        return _sigmoid(self._visible_appeal(user_R, item_RC) * 0.8 + 0.8 * hidden_RC - 0.5)


def _candidates(
    exposure_I: FloatArray, shape: tuple[int, int], rng: np.random.Generator
) -> IntArray:
    """Distinct items for every request, roughly in proportion to their exposure.

    The items are cut into as many stretches of equal exposure as there are candidates, and one is
    drawn from each.
    """
    requests, candidates = shape
    edges = np.cumsum(exposure_I)
    points = (np.arange(candidates) + rng.random(shape)) / candidates * edges[-1]
    item_RC = np.minimum(np.searchsorted(edges, points, side="right"), len(edges) - 1)
    # An item on the border of two stretches may come twice: the later one moves on, but not beyond
    # the last item.
    for c in range(1, candidates):
        item_RC[:, c] = np.maximum(item_RC[:, c], item_RC[:, c - 1] + 1)
    return np.minimum(item_RC, len(edges) - candidates + np.arange(candidates))


def _intercept(base_rate: float, std: float) -> float:
    """The mean of normal logits with `std` at which their probability is `base_rate`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        rate = float((weights * _sigmoid(middle + std * nodes)).sum())
        low, high = (middle, high) if rate < base_rate else (low, middle)
    return (low + high) / 2


def _unit(vectors: FloatArray) -> FloatArray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-x)))


# --- items.parquet and users.parquet -------------------------------------------------------------


def _write_items(market: Marketplace, target: Path) -> None:
    writer = None
    for first in range(0, len(market.items.topic_I), _ITEMS_PER_CHUNK):
        last = min(first + _ITEMS_PER_CHUNK, len(market.items.topic_I))
        table = _item_rows(market, np.arange(first, last))
        writer = writer or pq.ParquetWriter(target / "items.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _item_rows(market: Marketplace, rows: IntArray) -> pa.Table:
    config, items = market.config, market.items
    rng = market.rng(9, int(rows[0]))
    latent_BD, quality_B = items.latent_ID[rows], items.quality_I[rows]
    near_BT = np.exp(8 * latent_BD @ market.centres_TD.T)
    near_BT /= near_BT.sum(axis=1, keepdims=True)
    topic_B = items.topic_I[rows]
    wrong = rng.random(len(rows)) < _WRONG_CATEGORY_SHARE
    topic_B = np.where(wrong, rng.integers(0, market.num_topics, len(rows)), topic_B)
    names = pa.array([words.split()[0] for words in TOPIC_WORDS[: market.num_topics]])
    tags = np.argsort(-near_BT + rng.gumbel(0, 0.05, near_BT.shape), axis=1)[:, :2]
    offsets = pa.array(np.arange(0, 2 * len(rows) + 1, 2, dtype=np.int32))
    # A brand covers one topic and, noisily, one level of quality.
    level_B = np.clip(np.floor(quality_B + rng.normal(0, 0.5, len(rows)) + 2), 0, 3).astype(
        np.int64
    )
    price_B = np.exp(3 + 0.4 * quality_B + rng.normal(0, 0.4, len(rows)))
    no_image = rng.random(len(rows)) < _NO_IMAGE_SHARE
    images = render(latent_BD, quality_B, config.image_size, rng)
    return pa.table(
        {
            "item_id": spread_ids(rows),
            "category": names.take(pa.array(topic_B)),
            "tags": pa.ListArray.from_arrays(offsets, names.take(pa.array(tags.reshape(-1)))),
            "brand": topic_B * 4 + level_B,
            "price": pa.array(np.round(price_B, 2).astype(np.float32)),
            "text": describe(near_BT, quality_B, rng),
            "image": pc.if_else(pa.array(no_image), pa.scalar(None, pa.binary()), images),
        }
    )


def _write_users(market: Marketplace, target: Path) -> None:
    rng = market.rng(10)
    count = market.config.num_users
    # Age follows one coordinate of taste, the declared interest the first liked topic.
    age = 40 + 15 * (market.tastes_UD[:, 0] * np.sqrt(market.config.taste_dim) / 1.5)
    age = np.clip(age + rng.normal(0, 6, count), 16, 80).astype(np.int64) // 10 * 10
    names = pa.array([words.split()[0] for words in TOPIC_WORDS[: market.num_topics]])
    told = market.user_topics_U2[:, 0]
    told = np.where(rng.random(count) < 0.3, rng.integers(0, market.num_topics, count), told)
    interest = pa.array(told, mask=rng.random(count) < 0.2)
    country = rng.choice(len(_COUNTRIES), count, p=_zipf(len(_COUNTRIES)))
    table = pa.table(
        {
            "user_id": spread_ids(np.arange(count)),
            "age": age,
            "country": pa.array(_COUNTRIES).take(pa.array(country)),
            "interest": names.take(interest),
        }
    )
    pq.write_table(table, target / "users.parquet")


def _zipf(count: int) -> FloatArray:
    weights = 1 / np.arange(1, count + 1)
    return np.asarray(weights / weights.sum())

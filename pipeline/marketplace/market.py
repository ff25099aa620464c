"""The truth of the synthetic marketplace: who likes what, and with which probability they click.

    logit(click) = intercept(day) + user bias + device, hour and position effects
                 + ITEM_SCALE * ( sqrt(content_share) * content + sqrt(1 - content_share) * own )

`content` is the user's taste for the item's latent and the day's fashion for it: the latent shows
in text and image, so a new item's content can be read. `own` is the item's own appeal: only clicks
reveal it. Tastes, fashion and own appeal drift from day to day without changing their spread.

Everything is a function of (seed, id, day): no state is carried, whatever the size.
"""

# Shapes: B impressions, R requests, N items, D taste dimensions.

from typing import Any

import numpy as np

from embedding.raw_ids import Int64Array
from pipeline.config import SyntheticConfig
from pipeline.marketplace.counter_random import CounterRandom, FloatArray

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

ITEM_SCALE = 1.15
TASTE_SHARE = 0.7
"""Of the content's appeal, the share that differs from user to user; the rest is fashion."""
USER_SCALE = 0.35
POSITION_EFFECT = -0.06
DEVICES = ("phone", "tablet", "desktop", "tv")
DEVICE_EFFECT = np.array([0.1, 0.0, -0.1, -0.25])
HOUR_EFFECT = 0.15
EXPOSURE_SPREAD = 0.8
LATE_USERS = 0.2
"""Share of users who join after the first day."""
CALIBRATION_ROWS = 20_000


class Marketplace:
    """Latents, life spans and click probabilities."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        self.random = CounterRandom(config.seed)

    # --- items -----------------------------------------------------------------------------------

    @property
    def births(self) -> int:
        """Items born, and items that die, each day."""
        return round(self.config.num_items * self.config.births_per_day)

    @property
    def num_items_ever(self) -> int:
        """Items alive on any day; their ids are 0, 1, ..."""
        return self.config.num_items + self.births * (self.config.num_days - 1)

    def alive(self, day: int) -> tuple[int, int]:
        """First and past-the-last id of the items that live on a day: the oldest die first."""
        return day * self.births, day * self.births + self.config.num_items

    def latents(self, items: Int64Array) -> FloatArray:
        """What an item is like, (N, D), standard normal."""
        return self.random.normal("item latent", items, self.config.taste_dim)

    def own_appeal(self, items: Int64Array, day: int) -> FloatArray:
        """The part of an item's appeal that its content does not show, (N,), standard normal."""
        return self._drifting("item appeal", items, day)[:, 0]

    def exposure(self, items: Int64Array, day: int) -> FloatArray:
        """How often an item is shown relative to others, (N,); more appealing ones more often."""
        luck = self._drifting("item exposure", items, day)[:, 0]
        return np.exp(EXPOSURE_SPREAD * luck + 0.3 * self.own_appeal(items, day))

    # --- users -----------------------------------------------------------------------------------

    def tastes(self, users: Int64Array, day: int) -> FloatArray:
        """Weight of every latent dimension to a user, (R, D), variance 1; few are large."""
        draws = self._drifting("user taste", users, day, self.config.taste_dim)
        return draws * np.abs(draws) / np.sqrt(3.0)

    def joined(self, users: Int64Array) -> Int64Array:
        """Day a user joined, (R,)."""
        draw = self.random.uniform("user joined", users)[:, 0]
        late = draw < LATE_USERS if self.config.num_days > 1 else np.zeros(len(users), bool)
        days = 1 + (draw / LATE_USERS * (self.config.num_days - 1)).astype(np.int64)
        return np.where(late, days, 0)

    def own_device(self, users: Int64Array) -> Int64Array:
        """Index of the device a user mostly uses, (R,)."""
        return self.random.integers("user device", users, len(DEVICES))

    # --- clicks ----------------------------------------------------------------------------------

    def fashion(self, day: int) -> FloatArray:
        """Latent direction in demand on a day, (D,), unit length."""
        direction = self._drifting("fashion", np.zeros(1, np.int64), day, self.config.taste_dim)[0]
        return np.asarray(direction / np.linalg.norm(direction))

    def item_logits(
        self, tastes_RD: FloatArray, latents_RCD: FloatArray, own_RC: FloatArray, day: int
    ) -> FloatArray:
        """The part of the logit that depends on the item, (R, candidates)."""
        taste_RC = np.einsum("rd,rcd->rc", tastes_RD, latents_RCD) / np.sqrt(self.config.taste_dim)
        content_RC = np.sqrt(TASTE_SHARE) * taste_RC + np.sqrt(1 - TASTE_SHARE) * (
            latents_RCD @ self.fashion(day)
        )
        share = self.config.content_share
        return ITEM_SCALE * (np.sqrt(share) * content_RC + np.sqrt(1 - share) * own_RC)

    def request_logits(self, users: Int64Array, device: Int64Array, hour: Int64Array) -> FloatArray:
        """The part of the logit that all candidates of a request share, (R,)."""
        bias = USER_SCALE * self.random.normal("user bias", users)[:, 0]
        evening = HOUR_EFFECT * np.cos((hour - 20) / 24 * 2 * np.pi)
        return bias + DEVICE_EFFECT[device] + evening

    def position_logits(self) -> FloatArray:
        """Effect of the place in the list, (candidates,)."""
        return POSITION_EFFECT * np.arange(self.config.candidates_per_request)

    def intercept(self, logits: FloatArray) -> float:
        """Intercept with which the mean probability of these logits is the base rate."""
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            too_high = sigmoid(logits + middle).mean() > self.config.base_rate
            low, high = (low, middle) if too_high else (middle, high)
        return (low + high) / 2

    def _drifting(self, stream: str, ids: Int64Array, day: int, width: int = 1) -> FloatArray:
        """Normal draws that turn by `drift` a day: each day's step has about that deviation."""
        angle = self.config.drift * day
        first = self.random.normal(stream, ids, width)
        if angle == 0:
            return first
        return np.cos(angle) * first + np.sin(angle) * self.random.normal(f"{stream}'", ids, width)


def sigmoid(x: FloatArray) -> FloatArray:
    """The logistic function."""
    return 1.0 / (1.0 + np.exp(-x))

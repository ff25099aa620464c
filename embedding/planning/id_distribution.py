"""How often each row of a table is looked up: what caches, updates and exchanges depend on."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DEFAULT_EXPONENT = 1.0
"""Of a table nothing is known about: popularity of log data is close to Zipf's law."""
_NUM_BINS = 96
_BISECTIONS = 40


@dataclass(frozen=True)
class IdDistribution:
    """Rows in bins of falling popularity; rows of a bin are equally likely.

    `num_rows[b]` rows share the probability `mass[b]` of one lookup.
    """

    num_rows: tuple[float, ...]
    mass: tuple[float, ...]

    @property
    def total_rows(self) -> float:
        """Rows that are ever looked up."""
        return sum(self.num_rows)

    def expected_unique(self, num_lookups: float) -> float:
        """Distinct rows among independent lookups: sum of 1 - (1 - p)^n."""
        return _expected_unique(self, float(num_lookups))

    def share_of_hottest(self, num_rows: float) -> float:
        """Share of all lookups that go to the `num_rows` most popular rows.

        The hit rate of a cache that holds them: the best any eviction policy reaches on ids that
        are drawn independently.
        """
        rows_B, mass_B = np.asarray(self.num_rows), np.asarray(self.mass)
        taken_B = np.clip(num_rows - (np.cumsum(rows_B) - rows_B), 0, rows_B)
        return float((mass_B * taken_B / rows_B).sum())

    def missed_rows(self, num_cached: float, num_lookups: float) -> float:
        """Distinct rows of a step of independent lookups that a cache lacks.

        The cache holds the `num_cached` rows looked up last, as FBGEMM's does by default. By Che's
        approximation a row is there if it was looked up within the last t lookups, where t is the
        same for all rows: so many lookups touch as many rows as the cache holds.
        """
        return _missed_rows(self, float(num_cached), float(num_lookups))


@lru_cache(maxsize=65536)
def _expected_unique(ids: IdDistribution, num_lookups: float) -> float:
    rows_B, mass_B = np.asarray(ids.num_rows), np.asarray(ids.mass)
    p_B = np.minimum(mass_B / rows_B, 1 - 1e-15)
    return float((rows_B * -np.expm1(num_lookups * np.log1p(-p_B))).sum())


@lru_cache(maxsize=65536)
def _missed_rows(ids: IdDistribution, num_cached: float, num_lookups: float) -> float:
    rows_B, p_B = np.asarray(ids.num_rows), np.asarray(ids.mass) / np.asarray(ids.num_rows)
    if num_cached >= ids.total_rows:
        return 0.0
    low, high = 0.0, max(num_cached, 1.0)
    while (rows_B * -np.expm1(-high * p_B)).sum() < num_cached:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        touched = (rows_B * -np.expm1(-middle * p_B)).sum()
        low, high = (middle, high) if touched < num_cached else (low, middle)
    return float((rows_B * -np.expm1(-num_lookups * p_B) * np.exp(-low * p_B)).sum())


@lru_cache(maxsize=4096)
def zipf(num_rows: int, exponent: float) -> IdDistribution:
    """Row of rank k has a probability proportional to k ** -exponent; 0 is uniform."""
    edges = np.unique(np.geomspace(1, num_rows + 1, _NUM_BINS + 1).round()).astype(np.int64)
    if num_rows == 1:
        edges = np.array([1, 2])
    # Midpoint rule with half-integer limits; exact enough for bins of more than one rank, and the
    # first ranks have bins of their own.
    low_B, high_B = edges[:-1] - 0.5, edges[1:] - 0.5
    if abs(exponent - 1) < 1e-9:
        weight_B = np.log(high_B / low_B)
    else:
        power = 1 - exponent
        weight_B = (high_B**power - low_B**power) / power
    single_B = np.diff(edges) == 1
    weight_B[single_B] = edges[:-1][single_B].astype(float) ** -exponent
    mass_B = weight_B / weight_B.sum()
    return IdDistribution(tuple(np.diff(edges).astype(float)), tuple(mass_B))


def from_counts(counts: np.ndarray, num_bins: int = _NUM_BINS) -> IdDistribution:
    """The observed distribution of a table: `counts` are lookups of every touched row."""
    ordered = np.sort(counts[counts > 0])[::-1].astype(np.float64)
    if not len(ordered):
        return IdDistribution((1.0,), (1.0,))
    edges = np.unique(np.geomspace(1, len(ordered) + 1, num_bins + 1).round().astype(np.int64)) - 1
    sums = np.add.reduceat(ordered, edges[:-1])
    return IdDistribution(tuple(np.diff(edges).astype(float)), tuple(sums / sums.sum()))


def draw(ids: IdDistribution, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` popularity ranks (0 is the hottest row) from the distribution."""
    rows_B, mass_B = np.asarray(ids.num_rows), np.asarray(ids.mass)
    bins = rng.choice(len(rows_B), size=size, p=mass_B / mass_B.sum())
    starts_B = np.cumsum(rows_B) - rows_B
    return (starts_B[bins] + np.floor(rng.random(size) * rows_B[bins])).astype(np.int64)

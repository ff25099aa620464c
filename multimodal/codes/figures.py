"""Figures of codes and codebooks, as manifests hold them; imports nothing heavy."""

from typing import Literal

from embedding.config import StrictConfig


class LevelMetrics(StrictConfig):
    """Use and error of one level."""

    num_codes: int
    utilisation: float
    """Share of codes that some item has."""
    perplexity: float
    """exp(entropy of use): as many equally used codes would spread items as well."""
    mse: float
    """Mean squared distance of items to their reconstruction by this and the levels before."""


class CodeMetrics(StrictConfig):
    """Figures of one set of codes; version 1."""

    schema_version: Literal[1] = 1
    num_items: int
    collision_rate: float
    """Share of items whose full code another item has too."""
    largest_collision: int
    """Items of the most frequent full code."""
    mean_squared_length: float
    """Of the vectors: the error without any level."""
    levels: tuple[LevelMetrics, ...]
    hit_rate_1: float
    """Share of items that are the nearest of all items to what their own code stands for."""
    hit_rate_10: float
    """... that are among the ten nearest."""


class Stability(StrictConfig):
    """How much of the codes a refit left alone, on items that both sides know."""

    num_items: int
    full: float
    """Share of items whose whole code is unchanged."""
    prefixes: tuple[float, ...]
    """Share of items whose first 1, 2, ... levels are unchanged."""
    levels: tuple[float, ...]
    """Share of items whose code of that level is unchanged, whatever the levels before."""


class Drift(StrictConfig):
    """How far the items have moved since the codebooks were fitted; version 2."""

    schema_version: Literal[1, 2] = 2
    age_days: int
    num_new_items: int
    """Items that the fit did not know."""
    error_ratio: float | None
    """Quantization error of new items over `reference_mse`; None without either."""
    utilisation_ratio: float | None
    """Codewords that new items have, over those that as many items of the fit would have, on the
    level where it is lowest: new items that crowd into few codewords have fewer. None without RQ
    codes, new items, or items of the fit that are still there. Version 1: codewords that any item
    ever shown had, over those of the fit; it could hardly fall."""
    has_reference: bool = True
    """Whether the fit had items enough to hold some out; False: `error_ratio` is never known."""


class RefitDecision(StrictConfig):
    """Whether to fit new codebooks, and why."""

    refit: bool
    reasons: tuple[str, ...]
    """Sentences for the report; of no refit, too: what the policy could not look at."""

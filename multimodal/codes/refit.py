"""A refit of all codebooks, drift since the last one, and the decision between the two."""

# Shapes: N items, D vector dim, L levels, K codewords.

from dataclasses import dataclass
from datetime import date

import numpy as np
import torch

from multimodal.codes.config import Codes, RefitPolicy, Rq
from multimodal.codes.figures import Drift, RefitDecision
from multimodal.codes.match import Carry, align, carry_items, fresh
from multimodal.codes.residual_fit import fit_residual, training_rows
from multimodal.codes.residual_quantizer import CPU, ResidualCodebooks
from multimodal.codes.store import Codebooks
from multimodal.codes.vector_quantizer import take_item_codebook
from multimodal.codes.vectors import (
    ROWS_PER_BLOCK,
    BoolArray,
    FloatArray,
    Int32Array,
    Int64Array,
    read_rows,
    sample_rows,
)

_HELD_OUT_SHARE = 0.1
_MAX_HELD_OUT = 10_000


@dataclass(frozen=True)
class Refit:
    """New codebooks, and what becomes of the rows of the code tables."""

    codebooks: Codebooks
    carries: dict[str, Carry]
    """By code column: `sid_0`, ..., `vq`."""
    reference_mse: float | None
    """Error of items that were not fitted."""


def refit(
    config: Codes,
    item_ids_N: Int64Array,
    vectors_ND: FloatArray,
    before: Codebooks | None = None,
    device: torch.device = CPU,
) -> Refit:
    """Fit all codebooks; with `before`, code numbers keep their meaning as far as possible.

    Raises:
        UserError: too few, equal or broken vectors.
    """
    keep = before if before is not None and config.refit.keep_meaning else None
    carries: dict[str, Carry] = {}
    residual = items = reference = None
    if config.rq:
        earlier = keep.residual if keep else None
        start = earlier if earlier and _same_shape(earlier, config.rq, vectors_ND) else None
        residual = fit_residual(vectors_ND, config.rq, earlier=start, device=device)
        reference = held_out_error(vectors_ND, config.rq, residual, start, device)
        if earlier:
            residual, levels = align(earlier, residual)
        else:
            levels = [fresh(0, size) for size in residual.level_sizes]
        carries |= {f"sid_{level}": carry for level, carry in enumerate(levels)}
    if config.vq:
        known = keep.items if keep else None
        items = take_item_codebook(item_ids_N, vectors_ND, known)
        carries["vq"] = fresh(0, items.num_codes)
        if known:
            carries["vq"] = carry_items(known, items, config.vq, device)
    return Refit(Codebooks(residual, items, np.sort(item_ids_N)), carries, reference)


def held_out_error(
    vectors_ND: FloatArray,
    config: Rq,
    books: ResidualCodebooks,
    start: ResidualCodebooks | None,
    device: torch.device,
) -> float | None:
    """Quantization error of items outside of the training sample.

    The error of fitted items is too small a yardstick for new ones (by a fifth where there are 100
    items a codeword). Where the sample is the whole set, codebooks are fitted once more, to nine
    tenths of it. None if those are fewer than codewords.
    """
    num_items = len(vectors_ND)
    outside = np.setdiff1d(np.arange(num_items), training_rows(num_items, config))
    size = min(_MAX_HELD_OUT, int(num_items * _HELD_OUT_SHARE))
    if config.streaming is None and size and len(outside) >= size:
        rows = outside[sample_rows(len(outside), size, config.seed)]
        return float(books.squared_errors(read_rows(vectors_ND, rows), device)[-1])
    rows = sample_rows(num_items, size, config.seed)
    # Memory-mapped sets that stream are far larger than the sample: a sample stands for them.
    others = np.setdiff1d(training_rows(num_items, config), rows)
    fitted = np.unique(read_rows(vectors_ND, others), axis=0)
    if not size or len(fitted) <= 2 * config.codebook_size:
        return None
    partial = config.model_copy(update={"streaming": None})
    trial = fit_residual(read_rows(vectors_ND, others), partial, earlier=start, device=device)
    return float(trial.squared_errors(read_rows(vectors_ND, rows), device)[-1])


def _same_shape(books: ResidualCodebooks, config: Rq, vectors_ND: FloatArray) -> bool:
    shape = (config.num_levels, config.codebook_size, vectors_ND.shape[1])
    return tuple(books.codebooks_LKD.shape) == shape


# --- drift ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodesInUse:
    """RQ codes of the items of a day, under codebooks that were fitted to some of them."""

    codes_NL: Int32Array
    """No columns without RQ codes."""
    is_new_N: BoolArray
    """Items that the fit did not know."""
    level_sizes: tuple[int, ...]


def measure_drift(
    codebooks: Codebooks,
    reference_mse: float | None,
    vectors_ND: FloatArray,
    in_use: CodesInUse,
    age_days: int,
) -> Drift:
    """Drift of a day.

    Args:
        codebooks: the frozen ones.
        reference_mse: of their manifest.
        vectors_ND: of the items of the day; a block of the new ones is read at a time.
        in_use: their codes.
        age_days: days since the last day of the training window.
    """
    new, ratio = np.flatnonzero(in_use.is_new_N), None
    if codebooks.residual and reference_mse and len(new):
        error = 0.0
        for rows in np.split(new, range(ROWS_PER_BLOCK, len(new), ROWS_PER_BLOCK)):
            block_BD, codes_BL = read_rows(vectors_ND, rows), in_use.codes_NL[rows]
            error += codebooks.residual.errors_of_codes(block_BD, codes_BL)[-1] * len(rows)
        ratio = float(error / len(new) / reference_mse)
    return Drift(
        age_days=age_days,
        num_new_items=len(new),
        error_ratio=ratio,
        utilisation_ratio=_utilisation_ratio(in_use) if in_use.level_sizes else None,
        has_reference=codebooks.residual is None or reference_mse is not None,
    )


def _utilisation_ratio(in_use: CodesInUse) -> float | None:
    """Codewords of the new items, over the mean number that as many draws from the others hit.

    All items ever shown would be no yardstick: codewords that old items have stay in use for ever.
    """
    new_NL, fitted_NL = in_use.codes_NL[in_use.is_new_N], in_use.codes_NL[~in_use.is_new_N]
    if not len(new_NL) or not len(fitted_NL):
        return None
    ratios = []
    for level, size in enumerate(in_use.level_sizes):
        share_K = np.bincount(fitted_NL[:, level], minlength=size) / len(fitted_NL)
        expected = float((1 - (1 - share_K) ** len(new_NL)).sum())
        ratios.append(len(np.unique(new_NL[:, level])) / expected)
    return min(ratios)


def age_in_days(last_day: str, today: str) -> int:
    """Days from the end of the training window to today."""
    return (date.fromisoformat(today) - date.fromisoformat(last_day)).days


def decide_refit(drift: Drift, policy: RefitPolicy) -> RefitDecision:
    """Refit on schedule or on drift."""
    reasons = []
    if policy.every_days is not None and drift.age_days >= policy.every_days:
        reasons.append(
            f"the codebooks are {drift.age_days} days old (every_days={policy.every_days})"
        )
    enough = drift.num_new_items >= policy.min_new_items
    if enough and drift.error_ratio is not None and drift.error_ratio > policy.max_error_ratio:
        reasons.append(
            f"{drift.num_new_items} new items have {drift.error_ratio:.2f} times the quantization "
            f"error of the fit (max_error_ratio={policy.max_error_ratio})"
        )
    use, least = drift.utilisation_ratio, policy.min_utilisation_ratio
    if enough and use is not None and use < least:
        reasons.append(
            f"{drift.num_new_items} new items use {use:.0%} of the codewords that as many items of "
            f"the fit would, on one level (min_utilisation_ratio={least})"
        )
    refits = bool(reasons)
    if not drift.has_reference:
        reasons.append(
            "max_error_ratio was not looked at: the fit had too few items to hold some out"
        )
    return RefitDecision(refit=refits, reasons=tuple(reasons))

"""Fits the cost model's constants to measured plans: non-negative, relative errors, robust.

For every phase the measured seconds are a sum of counts times constants on the slowest rank. Which
rank is slowest depends on the constants, so the fit and the choice of that rank take turns. Parts
that were measured alone, and the data sheet, hold constants that the plans leave undetermined.
"""

# Shapes: R plans, K counts, W ranks.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embedding.planning.cost import GroupKey, group_counts
from embedding.planning.cost_constants import CostConstants
from embedding.planning.counts import COUNT_NAMES, NUM_COUNTS, PHASE_OF_COUNT
from embedding.planning.plan_description import PHASES

TIMED_PARTS: Mapping[str, tuple[str, ...]] = {
    "input_dist": ("input_dist",),
    "prefetch": (),
    "lookup": ("lookup",),
    "output_dist": ("output_dist",),
    "backward": ("backward", "optimizer"),
}
"""Which of the measured parts of a step belong to a phase."""

PART_WEIGHT = 0.05
"""Weight of a constant measured alone, against the mean squared relative error of the plans."""
SHEET_WEIGHT = 1e-5
_SWEEPS = 400
_TURNS = 8
_REWEIGHTS = 4
_ROBUST_ERROR = 0.03
"""Relative errors above this count linearly, so that a disturbed measurement does not lead."""


@dataclass(frozen=True)
class MeasuredPlan:
    """Counts of a plan on every rank, and what it took."""

    name: str
    counts_WK: np.ndarray
    groups: tuple[GroupKey, ...]
    assembly_bytes: float
    ranks_per_host: int
    phase_s: Mapping[str, float]
    step_s: float


@dataclass(frozen=True)
class FitResult:
    """Constants, and what they predict of the plans they were fitted to."""

    constants: CostConstants
    predicted_s: tuple[float, ...]


def fit_constants(
    plans: Sequence[MeasuredPlan],
    *,
    sheet: CostConstants,
    parts: Mapping[str, float],
    source: str,
) -> FitResult:
    """Constants for one number of ranks.

    Args:
        plans: measured plans; several table sets, several sharding types.
        sheet: the data sheet's constants, for what nothing determines.
        parts: constants that were measured alone, in seconds per unit, by count name.
        source: goes into the constants.
    """
    cores = sheet.cores_per_host
    prior_K = np.array([parts.get(name, sheet.seconds.get(name, 0.0)) for name in COUNT_NAMES])
    weight_K = np.array([PART_WEIGHT if name in parts else SHEET_WEIGHT for name in COUNT_NAMES])
    constants_K = prior_K.copy()
    for _ in range(_TURNS):
        for phase, name in enumerate(PHASES):
            inside = np.equal(PHASE_OF_COUNT, phase)
            measured_R = np.array(
                [sum(plan.phase_s.get(part, 0.0) for part in TIMED_PARTS[name]) for plan in plans]
            )
            # A plan without exchanges may spend nothing in a phase.
            spent_R = measured_R > 0
            if not spent_R.any():
                continue
            slowest_RK = np.array([_slowest(p, inside, constants_K, cores) for p in plans])
            constants_K[inside] = _fit_phase(
                slowest_RK[spent_R], measured_R[spent_R], prior_K[inside], weight_K[inside]
            )
    return _fit_step(plans, constants_K, sheet, source)


def phases_of(plan: MeasuredPlan, constants_K: np.ndarray, cores: int | None) -> float:
    """Predicted seconds of all phases of a plan."""
    total = 0.0
    for phase in range(len(PHASES)):
        inside = np.equal(PHASE_OF_COUNT, phase)
        total += float(_slowest(plan, inside, constants_K, cores) @ constants_K[inside])
    return total


def _slowest(
    plan: MeasuredPlan, inside: np.ndarray, constants_K: np.ndarray, cores: int | None
) -> np.ndarray:
    """Counts, inside a phase, of the rank that it waits for; or of a host that lacks cores."""
    counts_WK = plan.counts_WK[:, inside]
    seconds_W = counts_WK @ constants_K[inside]
    counts_K: np.ndarray = counts_WK[int(seconds_W.argmax())]
    if cores is not None and plan.ranks_per_host > cores:
        hosts_HL = seconds_W.reshape(-1, plan.ranks_per_host)
        busiest = int(hosts_HL.sum(axis=1).argmax())
        if hosts_HL[busiest].sum() / cores > seconds_W.max():
            rows = slice(busiest * plan.ranks_per_host, (busiest + 1) * plan.ranks_per_host)
            counts_K = counts_WK[rows].sum(axis=0) / cores
    return counts_K + calls_of(plan.groups)[inside]


def calls_of(groups: Sequence[GroupKey]) -> np.ndarray:
    """(K,) calls of all groups."""
    total_K = np.zeros(NUM_COUNTS)
    for key in groups:
        total_K += group_counts(key)
    return total_K


def _fit_phase(
    counts_RK: np.ndarray, measured_R: np.ndarray, prior_K: np.ndarray, weight_K: np.ndarray
) -> np.ndarray:
    relative_RK = counts_RK / measured_R[:, None]
    # In units of the prior: one scale for all constants, and the pull towards it is relative.
    unit_K = np.where(prior_K > 0, prior_K, 1 / np.maximum(relative_RK.max(axis=0), 1e-30))
    pull_K = np.where(prior_K > 0, weight_K, 0.0) * len(measured_R)
    design_RK = relative_RK * unit_K
    x_K = np.ones(len(prior_K))
    robust_R = np.ones(len(measured_R))
    for _ in range(_REWEIGHTS):
        x_K = nonnegative_least_squares(design_RK, np.ones(len(measured_R)), robust_R, pull_K, x_K)
        errors_R = np.abs(design_RK @ x_K - 1)
        robust_R = 1 / np.maximum(errors_R, _ROBUST_ERROR) * _ROBUST_ERROR
    fitted_K: np.ndarray = x_K * unit_K
    return fitted_K


def fit_linear(counts_RK: np.ndarray, measured_R: np.ndarray) -> np.ndarray:
    """Non-negative constants of a robust fit of relative errors, nothing known before."""
    nothing_K = np.zeros(counts_RK.shape[1])
    return _fit_phase(counts_RK, measured_R, nothing_K, nothing_K)


def nonnegative_least_squares(
    design_RK: np.ndarray,
    target_R: np.ndarray,
    weight_R: np.ndarray,
    pull_K: np.ndarray,
    start_K: np.ndarray,
) -> np.ndarray:
    """The x >= 0 that minimises sum w (Ax - b)^2 + sum pull (x - 1)^2, by coordinate descent."""
    weighted_RK = design_RK * weight_R[:, None]
    gram_KK = design_RK.T @ weighted_RK + np.diag(pull_K)
    right_K = weighted_RK.T @ target_R + pull_K
    x_K = start_K.copy()
    for _ in range(_SWEEPS):
        before_K = x_K.copy()
        for k in range(len(x_K)):
            if gram_KK[k, k] > 0:
                x_K[k] = max(0.0, x_K[k] + (right_K[k] - gram_KK[k] @ x_K) / gram_KK[k, k])
        if np.abs(x_K - before_K).max() < 1e-9 * max(1.0, np.abs(x_K).max()):  # noqa: PLR2004
            break
    return x_K


def _fit_step(
    plans: Sequence[MeasuredPlan], constants_K: np.ndarray, sheet: CostConstants, source: str
) -> FitResult:
    """A whole step without barriers: the phases times a factor, the fields' assembly, a start."""
    cores = sheet.cores_per_host
    measured_R = np.array([plan.step_s for plan in plans])
    columns_R3 = np.array(
        [[phases_of(p, constants_K, cores), p.assembly_bytes, 1.0] for p in plans]
    )
    prior_3 = np.array([1.0, max(sheet.assembly_byte_s, 1e-12), max(sheet.step_s, 1e-6)])
    factor, byte_s, step_s = _fit_phase(
        columns_R3, measured_R, prior_3, np.array([1e-4, 1e-5, 1e-5])
    )
    constants = CostConstants(
        source=source,
        seconds=dict(zip(COUNT_NAMES, map(float, factor * constants_K), strict=True)),
        step_s=float(step_s),
        assembly_byte_s=float(byte_s),
        cores_per_host=cores,
    )
    predicted = columns_R3 @ np.array([factor, byte_s, step_s])
    return FitResult(constants, tuple(map(float, predicted)))

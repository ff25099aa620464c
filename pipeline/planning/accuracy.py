"""Measured plans against predicted ones: comparisons, figures, and the fit of a calibration."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from embedding.planning.calibration import (
    Calibration,
    RanksFit,
    Residual,
    installed_versions,
    processor_name,
)
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import CostModel, usage_of
from embedding.planning.cost_constants import data_sheet_constants
from embedding.planning.fit import TIMED_PARTS, MeasuredPlan, fit_constants
from embedding.planning.plan_description import PlanDescription
from embedding.planning.prediction import placement_of, predict
from pipeline.planning.bench import BenchCase, MeasuredRun, PlanComparison, case_request
from pipeline.planning.tables_view import placement


def compare(
    cases: Sequence[BenchCase],
    runs: Sequence[MeasuredRun],
    shape: ClusterShape,
    calibration: Path | None,
) -> list[PlanComparison]:
    """Every measured plan beside what the model says of it."""
    by_name = {case.name: case for case in cases}
    models: dict[str, CostModel] = {
        case.name: case_request(case, shape, calibration).model() for case in cases
    }
    comparisons = []
    for run in runs:
        plan, model = by_name[run.case].plans[run.plan_index], models[run.case]
        placed = placement_of(plan, list(model.loads.values()), shape)
        predicted = predict(model, placed)
        comparisons.append(
            PlanComparison(
                case=run.case,
                name=plan.proposer or "",
                plan=plan_label(plan),
                measured_s=run.step_s,
                scatter=abs(run.halves_s[0] - run.halves_s[1]) / 2 / run.step_s,
                predicted_s=predicted.step_s,
                measured_phase_s={
                    phase: sum(run.phase_s.get(part, 0.0) for part in parts)
                    for phase, parts in TIMED_PARTS.items()
                },
                predicted_phase_s=predicted.phase_s,
                measured_peak_bytes=max(run.peak_bytes) if run.peak_bytes else None,
                predicted_peak_bytes=predicted.step_peak_bytes,
            )
        )
    return comparisons


def plan_label(plan: PlanDescription) -> str:
    """A plan in one line."""
    return "; ".join(f"{table.table} {placement(table)}" for table in plan.tables)


def median_abs_error(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Median of |predicted / measured - 1|."""
    ratio = np.asarray(predicted) / np.asarray(measured)
    return float(np.median(np.abs(ratio - 1)))


def rank_correlation(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Spearman's; 0 where one side says nothing of order."""
    if len(set(measured)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return float(spearmanr(measured, predicted).statistic)


def measured_plans(
    cases: Sequence[BenchCase], runs: Sequence[MeasuredRun], shape: ClusterShape
) -> list[MeasuredPlan]:
    """What the fit needs of every run."""
    by_name = {case.name: case for case in cases}
    models = {case.name: case_request(case, shape, None).model() for case in cases}
    plans = []
    for run in runs:
        plan, model = by_name[run.case].plans[run.plan_index], models[run.case]
        usage = usage_of(model, placement_of(plan, list(model.loads.values()), shape))
        plans.append(
            MeasuredPlan(
                name=f"{run.case}: {plan_label(plan)}",
                counts_WK=usage.counts_WK,
                groups=tuple(usage.groups),
                assembly_bytes=model.assembly_bytes,
                ranks_per_host=shape.ranks_per_host,
                phase_s=run.phase_s,
                step_s=run.step_s,
            )
        )
    return plans


def fit_ranks(
    plans: Sequence[MeasuredPlan],
    shape: ClusterShape,
    parts: dict[str, float],
    process_bytes: int = 0,
) -> RanksFit:
    """Constants for one number of ranks, with their residuals."""
    result = fit_constants(
        plans,
        sheet=data_sheet_constants(shape),
        parts=parts,
        source=f"calibration of {shape.name}",
    )
    measured = [plan.step_s for plan in plans]
    return RanksFit(
        world_size=shape.world_size,
        ranks_per_host=shape.ranks_per_host,
        constants=result.constants.model_copy(update={"process_bytes": process_bytes}),
        parts=parts,
        residuals=tuple(
            Residual(plan=plan.name, measured_s=plan.step_s, predicted_s=predicted)
            for plan, predicted in zip(plans, result.predicted_s, strict=True)
        ),
        median_abs_error=median_abs_error(measured, result.predicted_s),
        rank_correlation=rank_correlation(measured, result.predicted_s),
    )


def new_calibration(
    shape: ClusterShape, device_name: str | None, fits: Sequence[RanksFit]
) -> Calibration:
    """Fits as a calibration of this machine and these versions; `device_name` of a GPU."""
    return Calibration(
        machine=shape.machine.name,
        device_name=device_name or processor_name(),
        cores=os.cpu_count() or 1,
        versions=installed_versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fits=tuple(fits),
    )

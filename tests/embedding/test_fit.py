"""The fit against scipy's solver, and against constants that the test itself chose."""

import numpy as np
import pytest
from scipy.optimize import nnls

from embedding.config import RowWiseAdagrad
from embedding.planning.choices import FUSED, choices_of
from embedding.planning.cluster_shape import parse_shape
from embedding.planning.cost import CostModel, usage_of
from embedding.planning.cost_constants import CostConstants, data_sheet_constants
from embedding.planning.counts import COUNT_NAMES
from embedding.planning.demand import StepSettings
from embedding.planning.fit import (
    MeasuredPlan,
    fit_constants,
    fit_linear,
    nonnegative_least_squares,
)
from embedding.planning.plan_description import PHASES
from embedding.planning.plan_samples import sample_placements, sample_tables
from embedding.planning.prediction import predict
from embedding.planning.workload import table_loads
from pipeline.planning.accuracy import median_abs_error, rank_correlation


def test_coordinate_descent_finds_what_scipy_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        design = rng.random((40, 6)) * 10 ** rng.uniform(-1, 1, 6)
        target = design @ np.maximum(rng.normal(size=6), 0) + 0.1 * rng.normal(size=40)
        nothing = np.zeros(6)
        found = nonnegative_least_squares(design, target, np.ones(40), nothing, np.ones(6))
        expected, _ = nnls(design, target)
        np.testing.assert_allclose(design @ found, design @ expected, atol=1e-3)
        assert (found >= 0).all()


def test_a_line_through_disturbed_points_is_found() -> None:
    sizes = np.array([1e5, 1e6, 4e6, 8e6, 2e7])
    seconds = 2e-9 * sizes + 1e-4
    seconds[2] *= 3  # a disturbed measurement
    byte_s, call_s = fit_linear(np.stack([sizes, np.ones(5)], axis=1), seconds)
    assert byte_s == pytest.approx(2e-9, rel=0.1)
    assert call_s == pytest.approx(1e-4, rel=0.25)


@pytest.mark.parametrize("topology", ["cpu:2", "cpu:4"])
def test_known_constants_come_back_from_plans_that_obey_them(topology: str) -> None:
    shape = parse_shape(topology)
    sheet = data_sheet_constants(shape).model_copy(update={"cores_per_host": 2})
    rng = np.random.default_rng(1)
    truth = CostConstants(
        source="truth",
        seconds={name: sheet.seconds[name] * float(rng.uniform(1, 6)) for name in COUNT_NAMES},
        step_s=1e-3,
        assembly_byte_s=1e-9,
        cores_per_host=2,
    )
    fitted = [_measured(seed, topology, truth, rng) for seed in range(12)]
    result = fit_constants(
        [plan for plans in fitted for plan in plans], sheet=sheet, parts={}, source="fit"
    )
    unseen = [p for s in range(100, 108) for p in _measured(s, topology, truth, None)]
    predicted = [_predicted(seed, topology, result.constants) for seed in range(100, 108)]
    measured = [plan.step_s for plan in unseen]
    flat = [value for values in predicted for value in values]
    sheets = [v for s in range(100, 108) for v in _predicted(s, topology, sheet)]
    assert median_abs_error(measured, flat) < 0.06
    assert rank_correlation(measured, flat) > 0.99
    assert median_abs_error(measured, sheets) > 0.4


def test_a_part_measured_alone_holds_what_plans_leave_open() -> None:
    shape = parse_shape("cpu:2")
    sheet = data_sheet_constants(shape)
    plans = [p for s in range(3) for p in _measured(s, "cpu:2", sheet, None)]
    # No plan of these uses managed collision, so only the part says what it costs.
    result = fit_constants(plans, sheet=sheet, parts={"input_managed_ids": 5e-6}, source="fit")
    assert result.constants.seconds["input_managed_ids"] == pytest.approx(5e-6, rel=0.2)


def _model(seed: int, topology: str, constants: CostConstants) -> tuple[CostModel, list]:
    tables, shape = sample_tables(seed), parse_shape(topology)
    loads = table_loads(tables.schema, exponent=tables.exponent)
    settings = StepSettings(tables.batch_size_per_rank, RowWiseAdagrad())
    model = CostModel(loads, shape, settings, constants)
    options = {load.name: choices_of(load, shape, (FUSED,)) for load in loads}
    # Which plans are drawn must not depend on the constants.
    drawn = CostModel(loads, shape, settings, data_sheet_constants(shape))
    return model, sample_placements(drawn, options, 5, seed)


def _measured(
    seed: int, topology: str, truth: CostConstants, rng: np.random.Generator | None
) -> list[MeasuredPlan]:
    model, placements = _model(seed, topology, truth)
    plans = []
    for placed in placements:
        predicted, usage = predict(model, placed), usage_of(model, placed)
        noise = 1.0 if rng is None else float(rng.normal(1, 0.03))
        parts = {phase: noise * predicted.phase_s[phase] for phase in PHASES}
        plans.append(
            MeasuredPlan(
                name="",
                counts_WK=usage.counts_WK,
                groups=tuple(usage.groups),
                assembly_bytes=model.assembly_bytes,
                ranks_per_host=model.shape.ranks_per_host,
                phase_s=parts,
                step_s=noise * predicted.step_s,
            )
        )
    return plans


def _predicted(seed: int, topology: str, constants: CostConstants) -> list[float]:
    model, placements = _model(seed, topology, constants)
    return [predict(model, placed).step_s for placed in placements]


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 8, 30).astype(float), rng.random(30)
    assert rank_correlation(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0.0

"""What `braid bench plan` does once its options are read: choose plans, run, compare, calibrate."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from embedding.config import RowWiseAdagrad
from embedding.errors import UserError
from embedding.planning.calibration import Calibration, constants_for
from embedding.planning.choices import FUSED, Choice, choices_of
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import CostModel
from embedding.planning.plan_description import PlanDescription, read_plan
from embedding.planning.plan_samples import all_sensible, sample_placements, sample_tables
from embedding.planning.planner import PlanRequest, plan_tables, shortlist_plans
from embedding.planning.prediction import describe, placement_of
from embedding.planning.proposers import uniform
from embedding.planning.search import layout_of_proposal
from embedding.planning.traffic import Traffic
from pipeline.config import Recipe
from pipeline.console import Reporter, size
from pipeline.planning.accuracy import compare, fit_ranks, measured_plans, new_calibration
from pipeline.planning.bench import (
    BenchCase,
    BenchEffort,
    BenchGroup,
    BenchReport,
    PlanComparison,
    Progress,
    case_request,
    run_cases,
)
from pipeline.planning.request import RequestChanges, changed_request
from pipeline.planning.tables_view import milliseconds

TABLES_PATH = "tables"
"""Where the benchmark's model, which is nothing but tables, holds them."""
MAX_EXHAUSTIVE = 400
FINALISTS = 6
FINAL_EFFORT = BenchEffort(min_seconds=45)
"""Of the run in which finalists meet."""
_PROCESS_SEEDS = range(900, 903)


@dataclass(frozen=True)
class BenchOptions:
    """Which plans of a recipe to run."""

    plans: tuple[Path, ...] = ()
    exhaustive: bool = False
    sampled: int = 0
    shortlist: int = 0
    exponent: float | None = None
    pooling: tuple[str, ...] = ()
    changes: RequestChanges = RequestChanges()


def bench_shape(present: ClusterShape, num_ranks: int) -> ClusterShape:
    """`num_ranks` ranks of the present cluster.

    Raises:
        UserError: It has fewer, or they do not fill its hosts evenly.
    """
    if num_ranks <= present.ranks_per_host:
        return present.model_copy(update={"num_hosts": 1, "ranks_per_host": num_ranks})
    hosts, rest = divmod(num_ranks, present.ranks_per_host)
    if rest or hosts > present.num_hosts:
        raise UserError(
            f"--ranks {num_ranks}: the cluster is {present.name}; use at most "
            f"{present.ranks_per_host} ranks, or whole hosts of it"
        )
    return present.with_hosts(hosts)


def recipe_case(recipe: Recipe, shape: ClusterShape, options: BenchOptions) -> BenchCase:
    """The recipe's tables with the plans that the options name.

    Raises:
        UserError: A plan is for other tables, or the exhaustive set is too large.
    """
    request = _with_load(changed_request(recipe, shape, options.changes), options)
    request = replace(request, tables_path=TABLES_PATH)
    return BenchCase(
        name=recipe.name,
        features=request.schema,
        traffic=request.traffic,
        exponent=request.exponent,
        batch_size_per_rank=request.settings.batch_size_per_rank,
        optimizer=request.settings.optimizer,
        sharding=recipe.embedding.sharding,
        plans=tuple(_chosen_plans(request, options)),
        calibration=request.calibration,
    )


def _with_load(request: PlanRequest, options: BenchOptions) -> PlanRequest:
    """A skew and lengths that are given count instead of those that traffic measured."""
    if options.exponent is not None:
        measured = request.traffic
        lengths = None if measured is None else measured.model_copy(update={"tables": ()})
        request = replace(request, exponent=options.exponent, traffic=lengths)
    if not options.pooling:
        return request
    names = [feature.name for feature in request.schema.id_features]
    given: dict[str, float] = {}
    for text in options.pooling:
        name, separator, value = text.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            separator = ""
        if not separator or name not in names:
            raise UserError(
                f"--pooling {text!r}: write it as feature=12.5; features are {', '.join(names)}"
            )
    traffic = request.traffic or Traffic(rows=0, rows_per_day=0)
    merged = traffic.model_copy(update={"ids_per_sample": traffic.ids_per_sample | given})
    return replace(request, traffic=merged)


def _chosen_plans(request: PlanRequest, options: BenchOptions) -> Iterator[PlanDescription]:
    model = request.model()
    loads = list(model.loads.values())
    choices = {load.name: choices_of(load, request.shape, (FUSED,)) for load in loads}
    for path in options.plans:
        placed = placement_of(read_plan(path), loads, request.shape)
        yield describe(model, placed, str(path), TABLES_PATH)
    if options.exhaustive:
        yield from _all_plans(request, model, choices)
    elif options.shortlist:
        yield from shortlist_plans(request, options.shortlist)
    else:
        if options.sampled:
            for number, placed in enumerate(sample_placements(model, choices, options.sampled, 0)):
                yield describe(model, placed, f"sample {number}", TABLES_PATH)
        if not options.plans:
            yield from _chosen_and_uniform(request, model, choices)


def _all_plans(
    request: PlanRequest, model: CostModel, choices: Mapping[str, Sequence[Choice]]
) -> Iterator[PlanDescription]:
    found = list(islice(all_sensible(model, choices), MAX_EXHAUSTIVE + 1))
    if len(found) > MAX_EXHAUSTIVE:
        raise UserError(
            f"--exhaustive: {len(choices)} tables on {request.shape.name} have more than "
            f"{MAX_EXHAUSTIVE} plans; use fewer tables or ranks, or --sample N"
        )
    for number, placed in enumerate(found):
        yield describe(model, placed, f"plan {number}", TABLES_PATH)


def _chosen_and_uniform(
    request: PlanRequest, model: CostModel, choices: Mapping[str, Sequence[Choice]]
) -> Iterator[PlanDescription]:
    """The chosen plan, and one of every sharding type; those that differ."""
    chosen = plan_tables(request).model_copy(update={"proposer": "chosen"})
    different = [chosen]
    for sharding, proposal in uniform(choices, model):
        placed = layout_of_proposal(model, choices, proposal)
        if placed is None:
            continue
        plan = describe(model, placed, f"uniform {sharding}", TABLES_PATH)
        if all(plan.tables != other.tables for other in different):
            different.append(plan)
    yield from different


def bench(
    case: BenchCase,
    shape: ClusterShape,
    group: BenchGroup,
    effort: BenchEffort,
    progress: Progress | None = None,
) -> BenchReport:
    """Run the plans and compare with what they were chosen by; needs an initialised Ray."""
    runs, _ = run_cases([case], group.of(shape.world_size), effort, progress=progress)
    return BenchReport(
        topology=shape.name,
        constants=constants_for(shape, case.calibration).source,
        comparisons=tuple(compare([case], runs, shape, case.calibration)),
    )


def fastest_plan(
    case: BenchCase, report: BenchReport, group: BenchGroup, effort: BenchEffort
) -> PlanDescription:
    """The fastest of a case's measured plans.

    The fastest of many noisy medians was lucky: the first few meet again, for longer.
    """
    finalists = finalists_of(case, report)
    again = case.model_copy(update={"plans": finalists})
    ranks = group.of(case.plans[0].world_size)
    runs, _ = run_cases([again], ranks, effort)
    return finalists[min(runs, key=lambda run: run.step_s).plan_index]


def finalists_of(case: BenchCase, report: BenchReport) -> tuple[PlanDescription, ...]:
    """The plans that were fastest in a report on all plans of the case."""
    order = sorted(range(len(case.plans)), key=lambda i: report.comparisons[i].measured_s)
    return tuple(case.plans[i] for i in order[:FINALISTS])


def sampled_cases(shape: ClusterShape, seeds: Sequence[int], plans_per_set: int) -> list[BenchCase]:
    """Random table sets, each with random plans; a seed always gives the same."""
    cases = []
    for seed in seeds:
        tables = sample_tables(seed)
        case = BenchCase(
            name=f"set {seed}",
            features=tables.schema,
            exponent=tables.exponent,
            batch_size_per_rank=tables.batch_size_per_rank,
            optimizer=RowWiseAdagrad(),
            plans=(),
        )
        cases.append(with_plans(case, shape, plans_per_set, seed))
    return cases


def with_plans(case: BenchCase, shape: ClusterShape, count: int, seed: int) -> BenchCase:
    """The case with random plans."""
    model = case_request(case, shape, None).model()
    options = {name: choices_of(load, shape, (FUSED,)) for name, load in model.loads.items()}
    placements = sample_placements(model, options, count, seed)
    plans = tuple(describe(model, placed, "sampled", TABLES_PATH) for placed in placements)
    return case.model_copy(update={"plans": plans})


def calibrate(
    present: ClusterShape,
    world_sizes: Sequence[int],
    group: BenchGroup,
    device_name: str | None,
    *,
    quick: bool,
    reporter: Reporter,
) -> Calibration:
    """Measure parts and sampled plans for every number of ranks, and fit the constants.

    Seeds of the table sets are below 1000; `benchmarks/plans.py` judges with others.
    """
    fits = []
    for world_size in world_sizes:
        shape = bench_shape(present, world_size)
        num_sets, per_set = (8, 4) if quick else (20, 6)
        cases = sampled_cases(shape, range(num_sets), per_set)
        effort = BenchEffort(rounds=5 if quick else 9)
        ranks = group.of(world_size)
        reporter.line(f"{world_size} ranks: parts, and {num_sets * per_set} plans")
        with reporter.stage("calibrate", unit="plans"):
            runs, parts = run_cases(
                cases, ranks, effort, time_parts=True, progress=reporter.advance
            )
        fit = fit_ranks(
            measured_plans(cases, runs, shape), shape, parts, process_bytes(shape, ranks)
        )
        reporter.line(
            f"{world_size} ranks: {len(runs)} plans fitted, median error "
            f"{fit.median_abs_error:.1%}, rank correlation {fit.rank_correlation:.3f}"
        )
        fits.append(fit)
    return new_calibration(present, device_name, fits)


def process_bytes(shape: ClusterShape, group: BenchGroup) -> int:
    """Memory of a rank beyond what the tables explain: the median of a few fresh worker groups."""
    found = []
    for case in sampled_cases(shape, _PROCESS_SEEDS, 1):
        runs, _ = run_cases([case], group, BenchEffort(rounds=2, memory_steps=4))
        (entry,) = compare([case], runs, shape, None)
        assert entry.measured_peak_bytes is not None
        found.append(max(entry.measured_peak_bytes - entry.predicted_peak_bytes, 0))
    return int(statistics.median(found))


def comparison_table(report: BenchReport) -> Table:
    """Measured beside predicted, fastest first."""
    view = Table(
        box=SIMPLE, title=f"{report.topology}, constants: {report.constants}", title_justify="left"
    )
    for column in ("plan", "step", "predicted", "error", "peak", "predicted"):
        view.add_column(column, justify="left" if column == "plan" else "right")
    for entry in sorted(report.comparisons, key=lambda c: c.measured_s):
        view.add_row(*_row(entry))
    return view


def _row(entry: PlanComparison) -> tuple[str, ...]:
    peak = entry.measured_peak_bytes
    return (
        entry.name,
        f"{milliseconds(entry.measured_s)} +-{entry.scatter:.0%}",
        milliseconds(entry.predicted_s),
        f"{entry.relative_error:+.0%}",
        "-" if peak is None else size(peak),
        size(entry.predicted_peak_bytes),
    )

"""`braid capacity`: every cluster of a sweep with its best plan, and the smallest that suffices.

Points are evaluated in parallel on Ray; a point loads neither torch nor torchrec.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import ray

from embedding.calibration import read_calibration
from embedding.choices import FUSED
from embedding.cluster_shape import ClusterShape
from embedding.config import FeatureSchema, TableConfig
from embedding.cost import RESERVED_SHARE
from embedding.errors import UserError
from embedding.limits import COLUMN_MULTIPLE, ELEMENT_BYTES
from embedding.plan_description import Prediction
from embedding.planning import PlanRequest, plan_tables
from embedding.refusal import fits, shortage
from embedding.traffic import Traffic, read_traffic
from pipeline.capacity_answer import answer_of, choose
from pipeline.capacity_types import (
    GPU_FLOPS_SHARE,
    CapacityAnswer,
    CapacityPoint,
    CapacityRequest,
    DenseCost,
    PointKey,
)
from pipeline.plan_request import plan_request

MAX_GROWTH = 1024.0
_GROWTH_PRECISION = 0.02
_POINTS_PER_TASK = 2


def run_capacity(
    request: CapacityRequest, progress: Callable[[int, int], None] | None = None
) -> CapacityAnswer:
    """Evaluate all points on an initialised Ray, and answer."""
    began = time.monotonic()
    if request.dense is None:
        text = ray.get(ray.remote(_dense_of).remote(request.model_dump_json()))
        request = request.model_copy(update={"dense": DenseCost.model_validate_json(text)})
    assert request.dense is not None
    keys = list(_keys(request))
    # Large clusters take longest: they go first, so that none is left at the end.
    order = sorted(range(len(keys)), key=lambda i: -keys[i].shape.world_size)
    shared = ray.put(request.model_dump_json())
    evaluate = ray.remote(_evaluate_on_ray)
    pending = {
        evaluate.remote(shared, [keys[i].model_dump_json() for i in chunk]): chunk
        for chunk in _chunks(order)
    }
    points: dict[int, CapacityPoint] = {}
    while pending:
        ready, _ = ray.wait(list(pending))
        for reference in ready:
            for index, text in zip(pending.pop(reference), ray.get(reference), strict=True):
                points[index] = CapacityPoint.model_validate_json(text)
        if progress:
            progress(len(points), len(keys))
    ordered = tuple(points[index] for index in range(len(keys)))
    chosen = choose(ordered, request.target)
    return CapacityAnswer(
        recipe=request.recipe.name,
        answer=answer_of(ordered, chosen, request.target) + _not_counted(request),
        target=request.target,
        chosen=chosen,
        dense=request.dense,
        points=ordered,
        seconds=time.monotonic() - began,
    )


def _not_counted(request: CapacityRequest) -> str:
    if request.recipe.content is None:
        return ""
    return (
        " The towers that encode items' content are not counted: give the products of ranker and "
        "towers by --dense-flops-per-row."
    )


def _chunks(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _POINTS_PER_TASK):
        yield order[start : start + _POINTS_PER_TASK]


def _dense_of(text: str) -> str:
    """Runs in a Ray worker, where torch may be imported."""
    from pipeline.dense_cost import dense_cost

    request = CapacityRequest.model_validate_json(text)
    traffic = None if request.traffic is None else read_traffic(request.traffic)
    return dense_cost(request.recipe, traffic).model_dump_json()


def _evaluate_on_ray(text: str, keys: list[str]) -> list[str]:
    """Runs in a Ray worker."""
    request = CapacityRequest.model_validate_json(text)
    found = (evaluate_point(request, PointKey.model_validate_json(key)) for key in keys)
    return [point.model_dump_json() for point in found]


def _keys(request: CapacityRequest) -> Iterator[PointKey]:
    for shape, batch, growth, factor in product(
        request.shapes, request.batch_sizes, request.growth, request.dim_factors
    ):
        yield PointKey(shape=shape, batch_size_per_rank=batch, growth=growth, dim_factor=factor)


def evaluate_point(request: CapacityRequest, key: PointKey) -> CapacityPoint:
    """The best plan on one cluster, its times and what would break it."""
    began = time.perf_counter()
    point = _point(request, key)
    planned = _request_of(request, key)
    try:
        plan = plan_tables(planned)
    except UserError as error:
        return point.model_copy(update={"refusal": str(error)})
    assert plan.predicted is not None
    inside, why = breaking_growth(replace(planned, kernels=(FUSED,)))
    growth = inside
    if FUSED not in planned.kernels:
        growth, why = breaking_growth(planned)
    elif inside is not None and len(planned.kernels) > 1:
        growth, why = breaking_growth(planned, known=inside)
    offloads = any(rank.host_bytes for rank in plan.predicted.ranks)
    figures = _figures(request, key, plan.predicted)
    kinds = Counter(f"{table.sharding} {table.kernel}" for table in plan.tables)
    return point.model_copy(
        update={
            **figures,
            "constants": plan.predicted.constants,
            "binding": plan.predicted.binding,
            "shardings": dict(kinds),
            "breaks_at_growth": growth,
            "breaks_first": why,
            "offloads_at_growth": 1.0 if offloads else inside,
            "days_left": _days_left(request, planned, growth),
            "search_s": time.perf_counter() - began,
        }
    )


def _point(request: CapacityRequest, key: PointKey) -> CapacityPoint:
    schema = _request_of(request, key).schema
    return CapacityPoint(
        topology=key.shape.name,
        machine=key.shape.machine.name,
        world_size=key.shape.world_size,
        num_hosts=key.shape.num_hosts,
        batch_size_per_rank=key.batch_size_per_rank,
        growth=key.growth,
        dim_factor=key.dim_factor,
        table_bytes=sum(t.num_embeddings * t.embedding_dim for t in schema.tables) * ELEMENT_BYTES,
        price_per_hour=key.shape.price_per_hour,
    )


def _request_of(request: CapacityRequest, key: PointKey) -> PlanRequest:
    recipe, shape = request.recipe, key.shape
    planned = plan_request(recipe, shape)
    calibration = next(
        (p for p in request.calibrations if read_calibration(p).machine == shape.machine.name), None
    )
    traffic = planned.traffic if request.traffic is None else read_traffic(request.traffic)
    settings = replace(planned.settings, batch_size_per_rank=key.batch_size_per_rank)
    return grown(
        replace(
            planned,
            schema=_with_dims(planned.schema, key.dim_factor),
            calibration=calibration,
            traffic=traffic,
            settings=settings,
            kernels=request.kernels,
        ),
        key.growth,
    )


def grown(request: PlanRequest, growth: float) -> PlanRequest:
    """The same tables with `growth` times the rows, and as skewed lookups."""
    if growth == 1:
        return request
    tables = tuple(
        t.model_copy(update={"num_embeddings": max(2, round(growth * t.num_embeddings))})
        for t in request.schema.tables
    )
    traffic = None if request.traffic is None else _spread(request.traffic, growth)
    schema = request.schema.model_copy(update={"tables": tables})
    return replace(request, schema=schema, traffic=traffic)


def _spread(traffic: Traffic, growth: float) -> Traffic:
    tables = tuple(
        t.model_copy(update={"bin_rows": tuple(growth * rows for rows in t.bin_rows)})
        for t in traffic.tables
    )
    return traffic.model_copy(update={"tables": tables})


def _with_dims(schema: FeatureSchema, factor: float) -> FeatureSchema:
    if factor == 1:
        return schema

    def scaled(table: TableConfig) -> TableConfig:
        dim = max(1, round(factor * table.embedding_dim / COLUMN_MULTIPLE)) * COLUMN_MULTIPLE
        return table.model_copy(update={"embedding_dim": dim})

    return schema.model_copy(update={"tables": tuple(map(scaled, schema.tables))})


def breaking_growth(request: PlanRequest, known: float = 1.0) -> tuple[float | None, str | None]:
    """The largest growth of all tables that fits, and what is short beyond it; `known` fits."""
    low, high = known, min(2 * known, MAX_GROWTH)
    if not fits(request):
        return 1.0, shortage(request, request.model())
    while fits(grown(request, high)):
        if high >= MAX_GROWTH:
            return None, None
        low, high = high, min(2 * high, MAX_GROWTH)
    while high / low > 1 + _GROWTH_PRECISION:
        middle = (low * high) ** 0.5
        if fits(grown(request, middle)):
            low = middle
        else:
            high = middle
    failing = grown(request, high)
    return low, shortage(failing, failing.model())


def _days_left(
    request: CapacityRequest, planned: PlanRequest, growth: float | None
) -> float | None:
    if growth is None:
        return None
    per_day = _growth_per_day(request, planned)
    return None if not per_day else (growth - 1) / per_day


def _growth_per_day(request: CapacityRequest, planned: PlanRequest) -> float | None:
    """Share of the tables' bytes that is added a day, by the tables that the traffic measured."""
    if planned.traffic is None:
        return request.growth_per_day
    gained = total = 0.0
    for table in planned.schema.tables:
        measured = planned.traffic.table(table.name)
        total += table.num_embeddings * table.embedding_dim
        if measured is not None and measured.new_rows_per_day is not None:
            gained += measured.new_rows_per_day * table.embedding_dim
    return gained / total if gained else request.growth_per_day


def _figures(
    request: CapacityRequest, key: PointKey, predicted: Prediction
) -> dict[str, float | int | None]:
    shape, batch = key.shape, key.batch_size_per_rank
    assert request.dense is not None
    dense = dense_seconds(request.dense, shape, batch)
    # On CUDA the pipeline exchanges the next batch's ids while the dense side computes. Caches are
    # filled in the lookup, not ahead of it.
    ahead = predicted.phase_s["input_dist"]
    hidden = min(ahead, dense) if shape.machine.device == "cuda" else 0.0
    step = predicted.step_s + dense - hidden
    rows_per_s = batch * shape.world_size / step
    price = shape.price_per_hour
    used = predicted.peak_bytes + RESERVED_SHARE * shape.device_bytes
    host = [
        sum(rank.host_bytes for rank in predicted.ranks[start : start + shape.ranks_per_host])
        for start in range(0, shape.world_size, shape.ranks_per_host)
    ]
    return {
        "step_s": step,
        "sparse_s": predicted.step_s,
        "dense_s": dense,
        "hidden_s": hidden,
        "rows_per_s": rows_per_s,
        "peak_bytes": int(used),
        "device_bytes": shape.device_bytes,
        "headroom": 1 - used / shape.device_bytes,
        "host_bytes": max(host),
        "cost_per_billion_rows": None if price is None else price / 3600 * 1e9 / rows_per_s,
    }


def dense_seconds(dense: DenseCost, shape: ClusterShape, batch_size_per_rank: int) -> float:
    """Forward, backward and the gradients' all-reduce, which two thirds of it can hide."""
    machine = shape.machine
    if machine.device == "cpu":
        compute = dense.cpu_seconds_per_row * batch_size_per_rank
    else:
        peak = machine.flops_bf16 if dense.precision == "bf16" else machine.flops_fp32
        compute = dense.flops_per_row * batch_size_per_rank / (GPU_FLOPS_SHARE * peak)
    world = shape.world_size
    ring = 2 * (world - 1) / world * dense.parameters * ELEMENT_BYTES
    # A ring over hosts runs on all network cards of a host at once.
    links = machine.intra_host_bandwidth
    if shape.num_hosts > 1:
        links = min(links, machine.inter_host_bandwidth * shape.ranks_per_host)
    return compute + max(0.0, ring / links - 2 / 3 * compute)

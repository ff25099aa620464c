"""`braid capacity`: every cluster of a sweep with its best plan, and the smallest that suffices.

Points are evaluated in parallel on Ray; a point loads neither torch nor torchrec.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import ray

from embedding.errors import UserError
from embedding.limits import ELEMENT_BYTES
from embedding.planning.calibration import read_calibration, suits
from embedding.planning.choices import FUSED
from embedding.planning.cost import RESERVED_SHARE
from embedding.planning.plan_description import Prediction
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.traffic import MIN_GROWTH_DAYS
from pipeline.capacity.answer import answer_of, choose
from pipeline.capacity.content_step import ContentStep, content_step
from pipeline.capacity.growth import breaking_growth, grown, with_dims
from pipeline.capacity.step import dense_seconds
from pipeline.capacity.types import CapacityAnswer, CapacityPoint, CapacityRequest, PointKey
from pipeline.planning.request import measured_traffic, plan_request
from pipeline.planning.reserve import Reserve, no_room, remedy, reserve_of

_POINTS_PER_TASK = 2


def run_capacity(
    request: CapacityRequest, progress: Callable[[int, int], None] | None = None
) -> CapacityAnswer:
    """Evaluate all points on an initialised Ray, and answer."""
    began = time.monotonic()
    request = _with_costs(request)
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
        answer=answer_of(ordered, chosen, request.target, request.recipe),
        target=request.target,
        chosen=chosen,
        dense=request.dense[1.0],
        content=request.content,
        points=ordered,
        seconds=time.monotonic() - began,
    )


def _with_costs(request: CapacityRequest) -> CapacityRequest:
    """Take the costs of dense side and content, where they are not given: once, for all points."""
    if _missing_dense(request) or (request.content is None and request.recipe.content is not None):
        found = ray.get(ray.remote(_costs_of).remote(request.model_dump_json()))
        request = CapacityRequest.model_validate_json(found)
    if request.dense_flops_per_row is None:
        return request
    dense = {f: c.with_flops(request.dense_flops_per_row) for f, c in request.dense.items()}
    return request.model_copy(update={"dense": dense})


def _missing_dense(request: CapacityRequest) -> list[float]:
    """Factors of the dims without a cost; the answer shows that of today's."""
    return [factor for factor in {1.0, *request.dim_factors} if factor not in request.dense]


def _chunks(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _POINTS_PER_TASK):
        yield order[start : start + _POINTS_PER_TASK]


def _costs_of(text: str) -> str:
    """Runs in a Ray worker, where torch may be imported. Returns the request with both costs."""
    from pipeline.capacity.dense_cost import dense_cost

    request = CapacityRequest.model_validate_json(text)
    traffic = measured_traffic(request.recipe)
    content, config = None, request.recipe.content
    if config is not None:
        from pipeline.capacity.content_cost import (
            content_cost,  # transformers: seconds, for content only
        )

        content = content_cost(request.recipe, config, traffic)
    dense = request.dense | {
        factor: dense_cost(with_dims(request.recipe, factor), traffic, content)
        for factor in _missing_dense(request)
    }
    return request.model_copy(update={"dense": dense, "content": content}).model_dump_json()


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
    full = no_room(planned)
    if full is not None:
        return point.model_copy(update={"refusal": f"{full}; {remedy(request.recipe)}"})
    try:
        plan = plan_tables(planned)
    except UserError as error:
        return point.model_copy(update={"refusal": str(error)})
    assert plan.predicted is not None

    def reserve(growth: float) -> Reserve:
        return _reserve(request, key, planned, growth * key.growth)

    inside, why = breaking_growth(replace(planned, kernels=(FUSED,)), reserve=reserve)
    growth = inside
    if FUSED not in planned.kernels:
        growth, why = breaking_growth(planned, reserve=reserve)
    elif inside is not None and len(planned.kernels) > 1:
        growth, why = breaking_growth(planned, known=inside, reserve=reserve)
    offloads = any(rank.host_bytes["tables"] for rank in plan.predicted.ranks)
    figures = _figures(request, key, planned, plan.predicted)
    kinds = Counter(f"{table.sharding} {table.kernel}" for table in plan.tables)
    return point.model_copy(
        update={
            **figures,
            "constants": plan.predicted.constants,
            "calibration": planned.calibration,
            "binding": plan.predicted.binding,
            "shardings": dict(kinds),
            "breaks_at_growth": growth,
            "breaks_first": why,
            "offloads_at_growth": 1.0 if offloads else inside,
            "days_left": _days_left(request, key, planned, growth),
            "traffic_days": _too_few_days(request, planned),
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
    planned = plan_request(with_dims(recipe, key.dim_factor), shape)
    # The recipe's is of the machine that trains now, which a sweep may leave out.
    files = (*request.calibrations, planned.calibration)
    calibration = next(
        (p for p in files if p is not None and suits(read_calibration(p), shape.machine)), None
    )
    settings = replace(planned.settings, batch_size_per_rank=key.batch_size_per_rank)
    planned = replace(planned, calibration=calibration, settings=settings, kernels=request.kernels)
    reserve = _reserve(request, key, planned, key.growth)
    return grown(reserve.of(planned), key.growth)


def _days_left(
    request: CapacityRequest, key: PointKey, planned: PlanRequest, growth: float | None
) -> float | None:
    """Until the point's tables are `growth` times as large."""
    if growth is None:
        return None
    per_day = _growth_per_day(request, key, planned)
    return None if not per_day else (growth - 1) / per_day


def _too_few_days(request: CapacityRequest, planned: PlanRequest) -> int | None:
    if request.growth_per_day is not None or planned.traffic is None:
        return None
    return planned.traffic.days if planned.traffic.days < MIN_GROWTH_DAYS else None


def _growth_per_day(request: CapacityRequest, key: PointKey, planned: PlanRequest) -> float | None:
    """Share of the point's tables that is added a day: as given, else by the measured tables.

    Tables are enlarged as the rows in use become more: a table that is half empty stays so.
    """
    if request.growth_per_day is not None:
        return request.growth_per_day / key.growth
    if planned.traffic is None or planned.traffic.days < MIN_GROWTH_DAYS:
        return None
    gained = total = 0.0
    for table in planned.schema.tables:
        measured = planned.traffic.table(table.name)
        elements = table.num_embeddings * table.embedding_dim
        total += elements
        if measured is not None and measured.new_rows_per_day:
            gained += elements * measured.new_rows_per_day / measured.rows_touched
    return gained / total / key.growth


def _content_step(request: CapacityRequest, key: PointKey, growth: float) -> ContentStep | None:
    """Content on a point's cluster with so many times today's items."""
    config = request.recipe.content
    if config is None:
        return None
    assert request.content is not None, "costs are taken before points are evaluated"
    return content_step(request.content, config, key.shape, key.batch_size_per_rank, growth)


def _reserve(
    request: CapacityRequest, key: PointKey, planned: PlanRequest, growth: float
) -> Reserve:
    """What holds no table, with so many times today's items."""
    content = _content_step(request, key, growth)
    return reserve_of(planned, content, request.dense[key.dim_factor])


def _figures(
    request: CapacityRequest, key: PointKey, planned: PlanRequest, predicted: Prediction
) -> dict[str, float | int | None]:
    shape, batch = key.shape, key.batch_size_per_rank
    dense = dense_seconds(request.dense[key.dim_factor], shape, batch)
    # On CUDA the pipeline exchanges the next batch's ids while the dense side computes. Caches are
    # filled in the lookup, not ahead of it.
    ahead = predicted.phase_s["input_dist"]
    hidden = min(ahead, dense) if shape.machine.device == "cuda" else 0.0
    step = predicted.step_s + dense - hidden
    assert planned.reserved_bytes is not None
    used = predicted.peak_bytes + planned.reserved_bytes
    figures: dict[str, float | int | None] = {}
    content = _content_step(request, key, key.growth)
    if content is not None:
        added = content.added_seconds(step)
        step += added
        figures = {
            "content_s": added,
            "content_actor_s": content.actor_s or None,
            "content_items": content.items.encoded,
            "content_bytes": int(content.rank_bytes),
        }
    rows_per_s = batch * shape.world_size / step
    price = shape.price_per_hour
    host = [
        planned.reserved_host_bytes
        + sum(
            sum(rank.host_bytes.values())
            for rank in predicted.ranks[start : start + shape.ranks_per_host]
        )
        for start in range(0, shape.world_size, shape.ranks_per_host)
    ]
    free, host_free = 1 - used / shape.device_bytes, None
    if shape.machine.device == "cuda":
        whole = shape.host_bytes_per_rank * shape.ranks_per_host
        host_free = 1 - RESERVED_SHARE - max(host) / whole
    return figures | {
        "step_s": step,
        "sparse_s": predicted.step_s,
        "dense_s": dense,
        "hidden_s": hidden,
        "rows_per_s": rows_per_s,
        "peak_bytes": int(used),
        "device_bytes": shape.device_bytes,
        "headroom": min(free, 1.0 if host_free is None else host_free),
        "host_headroom": host_free,
        "host_bytes": max(host),
        "cost_per_billion_rows": None if price is None else price / 3600 * 1e9 / rows_per_s,
    }

"""Tables that grow: wider rows, the same lookups over more rows, and how far a cluster has room."""

from collections.abc import Callable
from dataclasses import replace

from embedding.config import TableConfig
from embedding.errors import UserError
from embedding.limits import COLUMN_MULTIPLE
from embedding.planning.planner import PlanRequest
from embedding.planning.refusal import fits, shortage
from embedding.planning.traffic import Traffic
from pipeline.config import Recipe
from pipeline.planning.reserve import Reserve, no_room

MAX_GROWTH = 1024.0
_GROWTH_PRECISION = 0.02


def with_dims(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with tables so many times as wide, as near as the kernels allow."""
    if factor == 1:
        return recipe

    def scaled(table: TableConfig) -> TableConfig:
        dim = max(1, round(factor * table.embedding_dim / COLUMN_MULTIPLE)) * COLUMN_MULTIPLE
        return table.model_copy(update={"embedding_dim": dim})

    tables = tuple(map(scaled, recipe.features.tables))
    features = recipe.features.model_copy(update={"tables": tables})
    return recipe.model_copy(update={"features": features})


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


def breaking_growth(
    request: PlanRequest,
    known: float = 1.0,
    reserve: Callable[[float], Reserve] | None = None,
) -> tuple[float | None, str | None]:
    """The largest growth of all tables that fits, and what is short beyond it.

    Args:
        request: the tables before they grow.
        known: a growth that fits.
        reserve: by growth, what holds no table; by default the request's.
    """

    def at(growth: float) -> PlanRequest:
        larger = grown(request, growth)
        return larger if reserve is None else reserve(growth).of(larger)

    low, high = known, min(2 * known, MAX_GROWTH)
    if not fits(request):
        return 1.0, _short(request)
    while fits(at(high)):
        if high >= MAX_GROWTH:
            return None, None
        low, high = high, min(2 * high, MAX_GROWTH)
    while high / low > 1 + _GROWTH_PRECISION:
        middle = (low * high) ** 0.5
        if fits(at(middle)):
            low = middle
        else:
            high = middle
    return low, _short(at(high))


def _short(request: PlanRequest) -> str:
    full = no_room(request)
    if full is not None:
        return full
    try:
        return shortage(request, request.model())
    except UserError as error:
        return str(error)  # a sharding that so many rows do not allow

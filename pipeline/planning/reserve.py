"""Memory that plans leave to content: the bank of all items, and what a step holds of them."""

from dataclasses import replace

from embedding.errors import UserError
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import RESERVED_SHARE
from embedding.planning.planner import PlanRequest
from multimodal.content_config import ContentConfig
from multimodal.tower_files import require_files
from pipeline.capacity.content_step import ContentStep, content_step
from pipeline.config import Recipe
from pipeline.console import size

LESS_CONTENT = (
    "lower content.gradient.max_items_per_step, set content.gradient.micro_batch_items, or choose "
    "ranks with more memory"
)


def with_reserve(request: PlanRequest, recipe: Recipe) -> PlanRequest:
    """The request with room for the recipe's content; loads its towers where it has some.

    Raises:
        UserError: a tower cannot be loaded, nothing says how many items there are, or content and
            reserve fill a rank.
    """
    content = recipe.content
    if content is None:
        return request
    require_towers(content)
    from pipeline.capacity.content_cost import content_cost  # torch and transformers

    cost = content_cost(recipe, content, request.traffic, timed=False)
    step = content_step(cost, content, request.shape, request.settings.batch_size_per_rank)
    reserved = replace(request, reserved_bytes=beside_tables(step, request.shape))
    full = no_room(reserved)
    if full is not None:
        raise UserError(f"{full}; {LESS_CONTENT}")
    return reserved


def beside_tables(content: ContentStep | None, shape: ClusterShape) -> float | None:
    """Bytes of every rank for everything but tables; None: the share that planning keeps free."""
    if content is None:
        return None
    return RESERVED_SHARE * shape.device_bytes + content.rank_bytes


def no_room(request: PlanRequest) -> str | None:
    """That content, which needs memory beside the tables, leaves them none; None if it does."""
    reserved, whole = request.reserved_bytes, request.shape.device_bytes
    if reserved is None or reserved < whole:
        return None
    return f"content and the reserve take {size(reserved)} of the {size(whole)} of every rank"


def require_towers(content: ContentConfig) -> None:
    """Before anything is started: what towers take is counted from their files.

    Raises:
        UserError: one is not there.
    """
    for name, tower in content.towers.items():
        try:
            require_files(tower)
        except UserError as error:
            key = f"content.{name}" if len(content.towers) > 1 else "content"
            raise UserError(
                f"content.{name}: planning counts the tower from its files; {error}, or leave it "
                f"out by --set {key}=null"
            ) from error

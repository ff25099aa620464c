"""Memory that plans leave to what is no table: content, a dense side that is known, copies."""

from dataclasses import dataclass, replace

from embedding.errors import UserError
from embedding.planning.cost import RESERVED_SHARE, SLACK_SHARE
from embedding.planning.planner import PlanRequest
from multimodal.content_config import ContentConfig
from multimodal.tower_files import require_files
from pipeline.capacity.content_step import ContentStep, content_step
from pipeline.capacity.types import DenseCost
from pipeline.config import Recipe
from pipeline.console import size

_LESS_CONTENT = (
    "lower content.gradient.max_items_per_step, set content.gradient.micro_batch_items, "
)


@dataclass(frozen=True)
class Reserve:
    """What a cluster keeps free of tables."""

    rank_bytes: float
    """Of every rank."""
    host_bytes: float
    """Of every host of GPUs, beside the share that planning keeps free there."""

    def of(self, request: PlanRequest) -> PlanRequest:
        """The request with so much reserved."""
        return replace(request, reserved_bytes=self.rank_bytes, reserved_host_bytes=self.host_bytes)


def reserve_of(
    request: PlanRequest, content: ContentStep | None, dense: DenseCost | None = None
) -> Reserve:
    """What is kept free on the request's cluster, for its batch size.

    Rank 0 alone copies bank and dense side for a checkpoint, into its own memory on CPU and into
    its host's with GPUs; the others keep as much free, as ranks and hosts are equal.

    Args:
        request: with whatever is reserved in it.
        content: the part of a step that is content.
        dense: the dense side; None: it is not known, and has the share that planning keeps free.
    """
    whole = request.shape.device_bytes
    rank_bytes, copied = RESERVED_SHARE * whole, 0.0
    if dense is not None:
        needed = dense.rank_bytes(request.settings.batch_size_per_rank)
        rank_bytes = max(rank_bytes, SLACK_SHARE * whole + needed)
        copied += dense.copy_bytes
    if content is not None:
        rank_bytes += content.rank_bytes
        copied += content.copy_bytes
    if request.shape.machine.device == "cpu":
        return Reserve(rank_bytes + copied, 0.0)
    return Reserve(rank_bytes, copied)


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
    reserved = reserve_of(request, step).of(request)
    full = no_room(reserved)
    if full is not None:
        raise UserError(f"{full}; {remedy(recipe)}")
    return reserved


def no_room(request: PlanRequest) -> str | None:
    """That what needs memory beside the tables leaves them none; None if it does."""
    reserved, whole = request.reserved_bytes, request.shape.device_bytes
    if reserved is None or reserved < whole:
        return None
    return f"what is no table takes {size(reserved)} of the {size(whole)} of every rank"


def remedy(recipe: Recipe) -> str:
    """Of a cluster without room for tables."""
    less = "" if recipe.content is None else _LESS_CONTENT
    return f"{less}use fewer rows a rank (batch_size_per_rank), or choose ranks with more memory"


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

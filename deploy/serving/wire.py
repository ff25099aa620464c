"""What a service is asked and answers, as JSON."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, StrictBool, StrictFloat, StrictInt, StrictStr

from embedding.config import StrictConfig

MAX_CANDIDATES = 10_000
MAX_HISTORY = 10_000
MAX_LIST = 1_000
"""Values of a context column that holds lists."""
_YEAR_10000_MS = 253_402_300_800_000

Id = StrictBool | StrictInt | StrictStr
"""As in the event log: an integer or a string."""
Milliseconds = Annotated[int, Field(strict=True, ge=0, lt=_YEAR_10000_MS)]
"""Since 1970, UTC."""
ContextValue = Id | StrictFloat | Annotated[list[Id | None], Field(max_length=MAX_LIST)] | None
IdKind = Literal["integer", "string", "any"]


class ScoreRequest(StrictConfig):
    """One user, and the items that may be shown to them."""

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1, max_length=MAX_CANDIDATES)]
    """Ids of items."""
    timestamp: Milliseconds | None = None
    """The service's own time where it is left out."""
    context: dict[str, ContextValue] = {}
    """The event columns that features read, one value for all candidates; null where unknown."""
    candidate_context: dict[
        str, Annotated[list[ContextValue], Field(max_length=MAX_CANDIDATES)]
    ] = {}
    """The same where candidates differ: one value a candidate, in their order."""
    histories: dict[str, dict[str, Annotated[list[Id | None], Field(max_length=MAX_HISTORY)]]] = {}
    """By history: `item_id`, `timestamp` (milliseconds) and what else its sequences read of past
    events (null where unknown); lists of one length, oldest first."""


class ServedModel(StrictConfig):
    """Which bundle answers."""

    date: str | None
    """Day of its run; None where a bundle was named instead of an output directory."""
    artifact_id: str
    """Of what was published; of a bundle that was named, a hash of its `bundle.json`."""
    bundle: str
    """Directory."""


class ScoreResponse(StrictConfig):
    """What the model says of every candidate."""

    schema_version: Literal[1] = 1
    model: ServedModel
    candidates: list[Id]
    """As they were asked, in that order."""
    probabilities: dict[str, list[float]]
    """By task, one a candidate."""
    unknown_candidates: NonNegativeInt
    """Candidates without a row in items.parquet: their columns count as missing."""
    unknown_user: bool
    """Whether the user has no row in users.parquet; false where there is no such file."""
    candidates_without_codes: NonNegativeInt
    """Candidates that came after the codes of the model, which read as missing; 0 for a model
    without codes."""


class ContextForm(StrictConfig):
    """What a context column holds."""

    values: IdKind | Literal["number"]
    is_list: bool = False


class RequestForm(StrictConfig):
    """What a request to the model must hold."""

    user_id: IdKind
    item_id: IdKind
    context: dict[str, ContextForm]
    """Columns that every request gives, in `context` or in `candidate_context`."""
    histories: dict[str, dict[str, IdKind]]
    """Columns of each history; times are integers."""


class ServiceState(StrictConfig):
    """What a replica serves, and what keeps it from serving something newer."""

    schema_version: Literal[1] = 1
    replica: str = ""
    """Which one says so."""
    token: str = ""
    """Of the `braid serve` that started it."""
    model: ServedModel
    tasks: list[str]
    request: RequestForm
    loaded_at: str
    """UTC."""
    last_error: str | None = None
    """Why the newest model or catalogue could not be loaded; None where it is what is served."""

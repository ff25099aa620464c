"""What a service is asked and answers, as JSON."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, StrictBool, StrictFloat, StrictInt, StrictStr

from embedding.config import StrictConfig

Id = StrictInt | StrictStr
"""As in the event log: an integer or a string."""
ContextValue = StrictBool | StrictInt | StrictFloat | StrictStr | list[Id] | None

MAX_CANDIDATES = 10_000


class ScoreRequest(StrictConfig):
    """One user, and the items that may be shown to them."""

    user_id: Id
    candidates: Annotated[list[Id], Field(min_length=1, max_length=MAX_CANDIDATES)]
    """Ids of items."""
    timestamp: NonNegativeInt | None = None
    """Milliseconds since 1970, UTC; the service's own time where it is left out."""
    context: dict[str, ContextValue] = {}
    """The event columns that features read, one value for all candidates; null where unknown."""
    candidate_context: dict[str, list[ContextValue]] = {}
    """The same where candidates differ: one value a candidate, in their order."""
    histories: dict[str, dict[str, list[Id | None]]] = {}
    """By history: `item_id`, `timestamp` (milliseconds) and what else its sequences read of past
    events (null where unknown); lists of one length, oldest first."""


class ServedModel(StrictConfig):
    """Which bundle answers."""

    date: str | None
    """Day of its run; None where a bundle was named instead of an output directory."""
    artifact_id: str | None
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


class RequestForm(StrictConfig):
    """What a request to the model must hold."""

    context: list[str]
    """Columns that every request gives, in `context` or in `candidate_context`."""
    histories: dict[str, list[str]]
    """Columns of each history."""
    item_id: Literal["integer", "string"]
    user_id: Literal["integer", "string"] | None
    """None: any, there is no users.parquet."""


class ServiceState(StrictConfig):
    """What a replica serves, and what keeps it from serving something newer."""

    schema_version: Literal[1] = 1
    model: ServedModel
    tasks: list[str]
    request: RequestForm
    loaded_at: str
    """UTC."""
    last_error: str | None = None
    """Why the newest model or catalogue could not be loaded; None where it is what is served."""

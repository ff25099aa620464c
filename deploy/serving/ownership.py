"""Whose an application on a cluster is: a command ends what it has started, and nothing else.

Every `braid serve` gives its replicas a token of its own, which they tell with their state. One
that was started with --replace meanwhile has replicas with another token under the same name; and a
replacement that could not start has left those of before.
"""

from dataclasses import dataclass, field

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ReplicaState

ASK_S = 10.0
"""Until a replica must have said whose it is."""


@dataclass(frozen=True)
class Seen:
    """What is there under the name of an application."""

    tokens: frozenset[str]
    """Of the replicas that answered."""
    num_running: int
    """Replicas."""
    is_deploying: bool
    """Somebody has changed it, and the change is under way."""


@dataclass
class Application:
    """The application that a command starts."""

    name: str
    token: str
    has_started: bool = field(default=False, init=False)
    """Whether it has been up."""

    def end(self) -> bool:
        """Delete it where it is the command's own; whether nothing is left under its name."""
        seen = look(self.name)
        if seen is None:
            return True
        if not is_own(seen, self.token, has_started=self.has_started):
            return False
        serve.delete(self.name)
        return True


def is_own(seen: Seen, token: str, *, has_started: bool) -> bool:
    """Whether what is there bears the token of a command, and nobody is replacing it."""
    if seen.tokens - {token}:
        return False
    if has_started:  # a replica that does not answer may hang, and is the command's own
        return not seen.is_deploying
    return token in seen.tokens or not seen.num_running


def running_replicas(name: str) -> int | None:
    """How many replicas an application has; None where there is no such application."""
    known = serve.status().applications.get(name)
    if known is None:
        return None
    states = [one.replica_states for one in known.deployments.values()]
    return sum(counts.get(ReplicaState.RUNNING, 0) for counts in states)


def look(name: str) -> Seen | None:
    """Ask the replicas of an application; None where there is no such application."""
    known, number = serve.status().applications.get(name), running_replicas(name)
    if known is None or number is None:
        return None
    tokens = set()
    try:
        handle = serve.get_app_handle(name) if number else None
        for _ in range(2 * number):  # each goes to one of them, at random
            assert handle is not None
            tokens.add(handle.model.remote().result(timeout_s=ASK_S).token)
    except (RayError, RayServeException, TimeoutError, AttributeError):
        pass  # of other code, or not able to answer
    return Seen(frozenset(tokens), number, known.status == ApplicationStatus.DEPLOYING)

"""Finding what the user must change inside errors that crossed Ray processes."""

import errno
from collections.abc import Iterator

from embedding.errors import UserError

_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def user_error(error: BaseException) -> UserError | None:
    """The `UserError` (or full disk) that an error stems from, or None where it is our fault.

    Ray wraps a worker's exception several times over: as `cause` (tasks), as
    `__cause__`, and in `worker_failures` by rank (Ray Train).
    """
    for link in _links(error, set()):
        # A RayTaskError also *is* its cause's class, with the remote traceback as its text.
        if isinstance(link, UserError) and not hasattr(link, "cause"):
            return link
        if isinstance(link, OSError) and link.errno in _NO_ROOM:
            where = f" while writing {link.filename}" if link.filename else ""
            return UserError(
                f"{_NO_ROOM[link.errno]}{where}; free some space (`braid prune`) or choose another "
                "--out, then run the same command again: finished stages are kept"
            )
    return None


def last_line(error: BaseException) -> str:
    """One line for an error: Ray puts the cause last, below its own words and tracebacks."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _links(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        for _, failure in sorted(failures.items()):
            yield from _links(failure, seen)
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        yield from _links(cause, seen)
    yield from _links(error.__cause__, seen)
    yield from _links(error.__context__, seen)

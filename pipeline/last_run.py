"""`DIR/last_run.json`: how the last `braid run` or `braid backfill` ended, for whoever watches it.

Ray's job server tells success from failure only; this tells why.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from embedding.config import StrictConfig
from embedding.files import write_durably
from pipeline.failures import last_line, user_error

LAST_RUN = "last_run.json"
OK, FAILED, USER, REFUSED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes; `REFUSED`: all stages ended well, and the gate did not let the model through."""
Outcome = Literal["ok", "refused", "failed", "interrupted"]
logger = logging.getLogger(__name__)


class LastRun(StrictConfig):
    """How a command that runs days ended; version 1."""

    schema_version: Literal[1] = 1
    command: str
    date: str | None
    """The day that it came to; None: to none."""
    outcome: Outcome
    code: int
    """The exit code of `braid`."""
    stage: str | None
    """That failed, was interrupted, or refused; None: none, or before the first one."""
    reason: str | None
    warnings: tuple[str, ...] = ()
    """What runs did not stop for and no stage says: models not promoted, or not started from."""
    started_at: str
    """UTC, ISO 8601."""
    ended_at: str


@dataclass(frozen=True)
class Progress:
    """How far a command has come."""

    date: str | None = None
    stage: str | None = None
    refusals: tuple[str, ...] = ()
    """Why gates refused models so far."""
    warnings: tuple[str, ...] = ()


@dataclass
class Recording:
    """What will be written."""

    progress: Callable[[], Progress] = field(default=Progress)


@contextmanager
def recorded(out: Path, command: str) -> Iterator[Recording]:
    """Write `last_run.json` when the block ends, however it ends.

    The caller holds the directory: the file is of the last command that did.
    """
    started_at, recording = _now(), Recording()
    try:
        yield recording
    except BaseException as error:
        _write(out, command, recording.progress(), started_at, error)
        raise
    _write(out, command, recording.progress(), started_at, None)


def read_last_run(out: Path) -> LastRun | None:
    """The file of a directory; None where there is none that can be read."""
    try:
        return LastRun.model_validate_json((out / LAST_RUN).read_text())
    except (OSError, ValidationError):
        return None


def _write(
    out: Path, command: str, at: Progress, started_at: str, error: BaseException | None
) -> None:
    outcome, code, reason = _ending(at, error)
    entry = LastRun(
        command=command,
        date=at.date,
        outcome=outcome,
        code=code,
        stage={"ok": None, "refused": "gate"}.get(outcome, at.stage),
        reason=reason,
        warnings=at.warnings,
        started_at=started_at,
        ended_at=_now(),
    )
    try:
        write_durably(out / LAST_RUN, entry.model_dump_json(indent=2))
    except OSError as fault:  # a full disk must not hide how the run itself ended
        logger.warning("%s could not be written: %s", out / LAST_RUN, fault)


def _ending(at: Progress, error: BaseException | None) -> tuple[Outcome, int, str | None]:
    if error is None and at.refusals:
        return "refused", REFUSED, "; ".join(at.refusals)
    if error is None:
        return "ok", OK, None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED, str(error) or "ctrl-C"
    remedy = user_error(error)
    if remedy is not None:
        return "failed", USER, str(remedy)
    return "failed", FAILED, f"{type(error).__name__}: {last_line(error)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""One run at a time in an output directory, and one change at a time of what is in production."""

import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import write_durably

CHANGE_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 1.0
"""Longer than `holder` keeps a lock that it only looks at."""
POLL_INTERVAL_S = 0.5
LOCK, OWNER = ".lock", ".owner.json"
logger = logging.getLogger(__name__)


class Holder(StrictConfig):
    """The process that holds an output directory, or runs a stage; version 1."""

    schema_version: Literal[1] = 1
    pid: int
    host: str
    command: str
    since: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"`{self.command}` (pid {self.pid} on {self.host}, since {self.since})"


def holder(out: Path) -> Holder | None:
    """Who holds an output directory; None: nobody, or it cannot be told who.

    What a killed process wrote about itself does not count: the lock went with it.
    """
    try:
        with (out / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        return _read_holder(out)
    except OSError:  # no lock was ever taken there, or it may not be looked at
        return None


def _say_nothing(_: str) -> None:
    pass


@contextmanager
def exclusive(
    out: Path, command: str, *, wait_s: float = 0, say: Callable[[str], None] = _say_nothing
) -> Iterator[None]:
    """Hold the output directory; the operating system releases it if the process dies.

    Args:
        out: output directory; created where it is not there.
        command: what others are told about who holds it.
        wait_s: how long to wait for another command that holds it.
        say: told once who is waited for.

    Raises:
        UserError: Another run holds it, or it cannot be written.
    """
    owner = out / OWNER
    with ExitStack() as held:
        # Only what happens here: errors of the command itself pass as they are.
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(_acquire(out, wait_s, say))
            held.callback(owner.unlink, missing_ok=True)
            _write_owner(owner, command)
        except Timeout as error:
            waited = f", still after {wait_s:g} seconds" if wait_s else ""
            raise UserError(
                f"--out {out} is in use by {_read_holder(out) or 'another run'}{waited}; wait for "
                "it or choose another --out"
            ) from error
        except PermissionError as error:
            raise UserError(
                f"--out {out} cannot be written: {error}; choose another --out"
            ) from error
        yield


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold a file that others replace, too; they do so in a moment, runs hold nothing meanwhile.

    Raises:
        UserError: Another process holds it all the time, or its directory cannot be written.
    """
    with ExitStack() as held:
        try:
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            held.enter_context(lock.acquire(timeout=CHANGE_TIMEOUT_S))
        except Timeout as error:
            raise UserError(
                f"{path} has been held by another process for {CHANGE_TIMEOUT_S:.0f} seconds; run "
                "the same command again"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}; check --out") from error
        yield


def _acquire(
    out: Path, wait_s: float, say: Callable[[str], None]
) -> AbstractContextManager[object]:
    lock = FileLock(out / LOCK)
    try:
        return lock.acquire(timeout=LOOK_TIMEOUT_S)
    except Timeout:
        if not wait_s:
            raise
    who = _read_holder(out) or "another run"
    say(f"--out {out} is in use by {who}; waiting for it, {wait_s:g} seconds at most")
    return lock.acquire(timeout=wait_s, poll_interval=POLL_INTERVAL_S)


def _write_owner(path: Path, command: str) -> None:
    """The lock holds without it: a full disk must not keep out what would free it.

    Raises:
        PermissionError: the directory may not be written.
    """
    try:
        write_durably(path, this_process(command).model_dump_json())
    except PermissionError:
        raise
    except OSError as fault:
        path.unlink(missing_ok=True)  # that of a killed process
        logger.warning("%s could not be written: %s; others are not told who holds it", path, fault)


def this_process(command: str) -> Holder:
    """What this process writes down while it holds something."""
    return Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        command=command,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_holder(out: Path) -> Holder | None:
    try:
        return Holder.model_validate_json((out / OWNER).read_text())
    except (OSError, ValidationError):
        return None

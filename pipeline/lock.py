"""One run at a time in an output directory, and one change at a time of what is in production."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from embedding.errors import UserError

CHANGE_TIMEOUT_S = 10.0


@contextmanager
def exclusive(out: Path, command: str) -> Iterator[None]:
    """Hold the output directory; the operating system releases it if the process dies.

    Raises:
        UserError: Another run holds it, or the directory cannot be written.
    """
    owner = out / ".owner.json"
    with ExitStack() as held:
        # Only what happens here: errors of the command itself pass as they are.
        try:
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(out / ".lock").acquire(timeout=0))
            held.callback(owner.unlink, missing_ok=True)
            owner.write_text(_account(command))
        except Timeout as error:
            raise UserError(
                f"--out {out} is in use by {_describe(owner)}; wait for it or choose another --out"
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


def _account(command: str) -> str:
    return json.dumps(
        {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": command,
            "since": datetime.now().isoformat(timespec="seconds"),
        }
    )


def _describe(owner: Path) -> str:
    try:
        facts = json.loads(owner.read_text())
    except (OSError, ValueError):
        return "another run"
    return f"`{facts['command']}` (pid {facts['pid']} on {facts['host']}, since {facts['since']})"

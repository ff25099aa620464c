"""What the user must change is said once: a restarted worker group says it again at once.

Ray restarts a group after any error, and one of these would only recur. A full disk is one, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from embedding.config import StrictConfig
from embedding.errors import CheckpointError, UserError
from pipeline.failures import user_error

REFUSAL = "refusal.json"
"""In the folder that all ranks share, and that outlives them."""


class _Refusal(StrictConfig):
    """Why a worker gave up."""

    message: str
    of_checkpoint: bool
    """Whether a checkpoint is at fault."""


@contextmanager
def refusing_once(folder: Path) -> Iterator[None]:
    """Around the work of a rank, which is not begun where it was refused before.

    Raises:
        UserError: what the work raises now, or raised before the group was restarted.
    """
    path = folder / REFUSAL
    if path.exists():
        refusal = _Refusal.model_validate_json(path.read_text())
        raise (CheckpointError if refusal.of_checkpoint else UserError)(refusal.message)
    try:
        yield
    except Exception as error:
        refused = user_error(error)
        if refused is None:
            raise
        with suppress(OSError):  # without room for it the group is restarted, and refuses again
            _remember(refused, path)
        if refused is error:
            raise
        raise refused from error


def _remember(refused: UserError, path: Path) -> None:
    refusal = _Refusal(message=str(refused), of_checkpoint=isinstance(refused, CheckpointError))
    partial = path.with_name(f".{REFUSAL}-{uuid4().hex}")  # several ranks may refuse at a time
    partial.write_text(refusal.model_dump_json())
    partial.replace(path)

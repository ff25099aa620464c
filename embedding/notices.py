"""Keeps the pages of notices that TorchRec, FBGEMM and torch print away from the terminal."""

import logging
from pathlib import Path

LIBRARIES = ("torchrec", "fbgemm_gpu", "torch", "py.warnings")


def divert_library_notices(path: Path) -> None:
    """Write these libraries' log records and all Python warnings to `path` instead.

    For entry points: it changes the process's logging. Torch's own handlers are replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.captureWarnings(capture=True)
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False

"""A Ray that many files of tests share: starting it and filling its processes takes seconds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.cluster import RaySession
from pipeline.config import ClusterConfig

NUM_RANKS = 2


class OneRay:
    """Started when the first tests need it, by two ranks as commands start it; others follow."""

    def __init__(self) -> None:
        self._session = RaySession(ClusterConfig(num_workers=NUM_RANKS))
        self._settings: dict[str, str] = {}
        """What Ray put in the environment, which a module's tests leave as it was."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Commands run meanwhile use it, and leave it running."""
        if not self._settings:
            before = dict(os.environ)
            self._session.start()
            self._settings = {k: v for k, v in os.environ.items() if before.get(k) != v}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._settings.items():
                patch.setenv(name, value)
            patch.setattr(RaySession, "start", lambda self: None)
            yield

    def stop(self) -> None:
        """End it."""
        self._session.__exit__()

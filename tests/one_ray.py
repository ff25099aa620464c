"""A Ray that several commands or tests share: starting one takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.cluster import RaySession
from pipeline.config import ClusterConfig


@contextmanager
def one_ray(cluster: ClusterConfig) -> Iterator[None]:
    """Started here as commands start it; those run meanwhile use it, and leave it running."""
    with RaySession(cluster) as session, pytest.MonkeyPatch.context() as patch:
        session.start()
        patch.setattr(RaySession, "start", lambda self: None)
        yield

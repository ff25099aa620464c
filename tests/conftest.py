"""Fixtures of tests in all folders."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """`tests.one_process.in_one_process` for all tests of a module that come after."""
    # Torch is imported here, for the tests that need it.
    from tests.one_process import in_one_process

    with in_one_process():
        yield

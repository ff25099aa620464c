"""Fixtures of tests in all folders."""

import os
from collections.abc import Iterator

import pytest

# Else a call of Ray in a process that has not started it would start one, which stays for all tests
# that come after.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: where processes share files, none is left alone at the end."""
    slow = {item.path for item in items if "integration" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What a module's tests set stays theirs: trainings tell TorchRec the ranks of a host so."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """`tests.one_process.in_one_process` for all tests of a module that come after."""
    # Torch is imported here, for the tests that need it.
    from tests.one_process import in_one_process

    with in_one_process():
        yield

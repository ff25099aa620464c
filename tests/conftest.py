"""Fixtures of tests in all folders."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.one_ray import OneRay

# Else a call of Ray in a process that has not started it would start one, which stays for all tests
# that come after.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

SHARING = pytest.StashKey[set[Path]]()
"""Files whose tests share a Ray."""
RAY: "pytest.StashKey[OneRay]" = pytest.StashKey()
"""That Ray, while it runs."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without garbage collections, here and later, of what is imported: they would find nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: where processes share files, none is left alone at the end.

    Of these, the ones that share a Ray come one after another.
    """
    slow = {item.path for item in items if "integration" in item.keywords}
    sharing = {item.path for item in items if "shared_ray" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path not in sharing, item.path not in slow))
    config.stash[SHARING] = sharing


@pytest.fixture(scope="module", autouse=True)
def environment(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module's tests set stays theirs: trainings tell TorchRec the ranks of a host so."""
    if request.path not in request.config.stash[SHARING]:
        stop_ray(request.config)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def shared_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """`tests.one_ray.OneRay` for all tests of a module that come after."""
    from tests.one_ray import OneRay

    stash = request.config.stash
    if RAY not in stash:
        stash[RAY] = OneRay()
    with stash[RAY].in_use():
        yield


def stop_ray(config: pytest.Config) -> None:
    """End the Ray that files shared, so that others may start their own."""
    if RAY in config.stash:
        config.stash[RAY].stop()
        del config.stash[RAY]


def pytest_unconfigure(config: pytest.Config) -> None:
    stop_ray(config)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """`tests.one_process.in_one_process` for all tests of a module that come after."""
    # Torch is imported here, for the tests that need it.
    from tests.one_process import in_one_process

    with in_one_process():
        yield

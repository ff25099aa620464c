"""Operations of the direct transport's groups; the members are threads of this process."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.content.group import TensorGroup, wait
from tests.pipeline.tensor_groups import check_operations, join

SIZE, TIMEOUT_S = 3, 60.0
CPU = torch.device("cpu")


def on_members(call: Callable[[int], Any], members: int = SIZE) -> list[Any]:
    with ThreadPoolExecutor(members) as pool:
        return list(pool.map(call, range(members)))


@pytest.fixture
def groups() -> Iterator[list[TensorGroup]]:
    store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
    found = on_members(lambda member: join(store, member, SIZE, CPU, TIMEOUT_S))
    yield found
    for group in found:
        group.leave()


def test_members_broadcast_and_add_up(groups: list[TensorGroup]) -> None:
    on_members(lambda member: check_operations(groups[member], member, SIZE, CPU))


def test_a_sum_has_the_same_bits_whoever_comes_first(groups: list[TensorGroup]) -> None:
    torch.manual_seed(0)
    of_all = torch.randn(SIZE, 5000) * 10.0 ** torch.randint(-4, 4, (SIZE, 5000))
    sums = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        own = of_all.clone()
        works = []
        for member in order:
            works.append(groups[member].add_to_first(own[member]))
            time.sleep(0.05)
        for work in works:
            wait(work, TIMEOUT_S)
        sums.append(own[0])
    assert not torch.equal(sums[0], of_all.flip(0).sum(0))  # the order of a sum shows in its bits
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_a_post_returns_before_others_come_and_a_wait_ends_in_time(
    groups: list[TensorGroup],
) -> None:
    started = time.monotonic()
    work = groups[1].broadcast(torch.zeros(4))
    assert time.monotonic() - started < 0.5
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        wait(work, 0.3)
    assert 0.3 <= time.monotonic() - started < 1.5
    for member in (0, 2):  # who was late is not lost
        groups[member].broadcast(torch.ones(4))
    wait(work, TIMEOUT_S)


def test_members_that_lack_one_do_not_wait_for_ever() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    started = time.monotonic()

    def lacking(member: int) -> None:
        with pytest.raises((TimeoutError, RuntimeError)):
            join(store, member, SIZE, CPU, timeout_s=0.5)

    on_members(lacking, SIZE - 1)
    assert time.monotonic() - started < 10

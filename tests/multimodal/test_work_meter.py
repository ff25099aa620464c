"""The meter of PyTorch work against sums done by hand."""

import torch

from multimodal.work_meter import WorkMeter, seconds_on_one_core


def test_bytes_alive_at_once_are_counted_and_freed_ones_are_not() -> None:
    given = torch.ones(1000)
    with WorkMeter() as meter:
        for _ in range(5):
            doubled = given * 2  # the old one lives until the name is taken
        tripled = doubled * 3
        del doubled
        view = tripled[10:].view(-1, 2)
        tripled.add_(1)
        given.add_(1)
    assert meter.peak_bytes == 2 * 4000
    assert meter.live_bytes == 4000
    assert meter.operations == 5 + 1 + 2
    del tripled, view
    assert meter.live_bytes == 0


def test_backward_is_metered_too() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    with WorkMeter() as meter:
        (torch.ones(20, 10) @ weight).sum().backward()
    assert weight.grad is not None
    # Input 800 bytes, product 800, its gradient is a view of one element, that of the weight 400.
    assert 800 + 800 <= meter.peak_bytes <= 800 + 800 + 400 + 16
    assert meter.live_bytes >= 400


def test_parts_are_timed_in_turn_on_one_core() -> None:
    threads, seen = torch.get_num_threads(), []
    first, second = seconds_on_one_core(
        lambda: seen.append(("first", torch.get_num_threads())),
        lambda: seen.append(("second", torch.get_num_threads())),
    )
    assert torch.get_num_threads() == threads
    assert seen == [("first", 1), ("second", 1)] * 4
    assert first >= 0
    assert second >= 0

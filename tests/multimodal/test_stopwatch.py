"""The stopwatch counts its blocks and nothing between them."""

import time

import torch

from multimodal.stopwatch import Stopwatch


def test_blocks_add_up_until_they_are_taken() -> None:
    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    longest = time.perf_counter() - started
    time.sleep(longest)  # outside: if it were counted, there would be too much
    assert 0.04 <= watch.take() <= longest
    assert watch.take() == 0.0

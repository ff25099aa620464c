"""Learning-rate factors against their formulas, and where they end up."""

import math

import pytest
import torch
from torch import nn

from ranking.schedule import LearningRates, rate_factor
from ranking.trainer_config import (
    CosineDecay,
    InverseSqrtDecay,
    LinearDecay,
    ScheduleConfig,
)


def _factors(config: ScheduleConfig, num_steps: int) -> list[float]:
    return [rate_factor(config, step, num_steps) for step in range(num_steps)]


def test_the_default_changes_nothing() -> None:
    assert _factors(ScheduleConfig(), 5) == [1.0] * 5


def test_warm_up_reaches_1_in_a_straight_line() -> None:
    assert _factors(ScheduleConfig(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_ends_with_the_run() -> None:
    config = ScheduleConfig(warmup_steps=2, decay=LinearDecay(final_factor=0.2))
    assert _factors(config, 6) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_decays_keep_their_last_value() -> None:
    linear = ScheduleConfig(decay=LinearDecay(num_steps=2, final_factor=0.5))
    cosine = ScheduleConfig(decay=CosineDecay(num_steps=2, final_factor=0.5))
    assert _factors(linear, 5) == pytest.approx([1.0, 0.75, 0.5, 0.5, 0.5])
    assert _factors(cosine, 5) == pytest.approx([1.0, 0.75, 0.5, 0.5, 0.5])


def test_cosine_and_inverse_square_root_follow_their_formulas() -> None:
    cosine = ScheduleConfig(warmup_steps=3, decay=CosineDecay(final_factor=0.1))
    root = ScheduleConfig(warmup_steps=3, decay=InverseSqrtDecay(timescale_steps=3))
    for step in range(3, 20):
        share = (step - 3) / 17
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
        assert rate_factor(cosine, step, 20) == pytest.approx(expected)
        # With the warm-up as timescale this is sqrt(warm-up / step), the usual form.
        assert rate_factor(root, step, 20) == pytest.approx(math.sqrt(3 / step))


def test_groups_keep_their_ratio_and_a_resume_its_base() -> None:
    fast, slow = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [fast], "lr": 0.4}, {"params": [slow], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    LearningRates(optimizer).set(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]
    resumed = torch.optim.SGD([{"params": [p], "lr": 1.0} for p in (fast, slow)])
    resumed.load_state_dict(optimizer.state_dict())
    LearningRates(resumed).set(1.0)
    assert [group["lr"] for group in resumed.param_groups] == [0.4, 0.1]

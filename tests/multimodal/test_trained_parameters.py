"""The optimizer of the content encoder against torch's own clipping and AdamW."""

import pytest
import torch
from torch import nn

from multimodal.content_config import ContentOptimizer
from multimodal.trained_parameters import TrainedParameters

RATES = {"low": 0.01, "high": 0.1}


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"low": nn.Parameter(torch.randn(3, 2)), "high": nn.Parameter(torch.randn(4))}


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_updates_are_those_of_clipped_adamw(max_norm: float | None) -> None:
    config = ContentOptimizer(weight_decay=0.1, max_grad_norm=max_norm)
    trained = TrainedParameters(parameters(), RATES.__getitem__, config, torch.device("cpu"))
    assert trained.gradient_norms(str) == {"low": 0.0, "high": 0.0}
    twin = parameters()
    groups = [{"params": [p], "lr": RATES[name]} for name, p in twin.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for scale in (1.0, 30.0, 0.01):  # Adam cancels a factor that is always the same
        gradient_P = scale * torch.randn(10)
        twin["low"].grad = gradient_P[:6].view(3, 2).clone()
        twin["high"].grad = gradient_P[6:].clone()
        norms = {name: float(torch.linalg.vector_norm(p.grad)) for name, p in twin.items()}
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twin.values(), max_norm)
        optimizer.step()

        trained.update(gradient_P, 1.0)
        for name, parameter in trained.named.items():
            torch.testing.assert_close(parameter, twin[name], rtol=1e-4, atol=1e-6)
        assert trained.gradient_norms(str) == pytest.approx(norms, rel=1e-5)

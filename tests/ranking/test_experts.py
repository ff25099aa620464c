"""Multi-task heads against loops over tasks and experts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ranking.experts import MixtureOfExperts, ProgressiveExtraction, Towers, build_heads
from ranking.experts_config import (
    MixtureOfExpertsConfig,
    ProgressiveExtractionConfig,
    SharedBottom,
)

# float32 sums of some tens of terms of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _by_hand(stack: nn.Sequential, index: int, x: Tensor) -> Tensor:
    for layer in stack:
        x = layer(x) if isinstance(layer, nn.ReLU) else _linear(layer, index, x)
    return x


def _linear(layer: nn.Module, index: int, x: Tensor) -> Tensor:
    return x @ layer.weight_EDH[index] + layer.bias_E1H[index, 0]


def _logit(towers: Towers, task: int, x: Tensor) -> Tensor:
    return _linear(towers.output, task, _by_hand(towers.hidden, task, x))[0]


def test_shared_bottom_equals_a_loop_over_tasks() -> None:
    block = build_heads(SharedBottom(tower_hidden=(7, 5)), 6, 3)
    x_BX = torch.randn(9, 6)
    logits_BT = block(x_BX)
    for b, x in enumerate(x_BX):
        for task in range(3):
            torch.testing.assert_close(logits_BT[b, task], _logit(block.towers, task, x), **CLOSE)


def test_mixture_of_experts_equals_a_loop_over_tasks_and_experts() -> None:
    config = MixtureOfExpertsConfig(num_experts=3, expert_hidden=(7, 5), tower_hidden=(4,))
    block = MixtureOfExperts(config, in_dim=6, num_tasks=2)
    x_BX = torch.randn(9, 6)
    logits_BT = block(x_BX)
    for b, x in enumerate(x_BX):
        for task in range(2):
            gate = block.gates.weight[task * 3 : task * 3 + 3] @ x
            gate = (gate + block.gates.bias[task * 3 : task * 3 + 3]).softmax(dim=0)
            mixed = sum(gate[e] * _by_hand(block.experts, e, x) for e in range(3))
            torch.testing.assert_close(
                logits_BT[b, task], _logit(block.towers, task, mixed), **CLOSE
            )


def _ple_by_loop(
    block: ProgressiveExtraction, config: ProgressiveExtractionConfig, x: Tensor, num_tasks: int
) -> Tensor:
    """One sample; groups are the tasks and, last, the shared one."""
    own, num_shared = config.num_task_experts, config.num_shared_experts
    groups = [x] * (num_tasks + 1)
    for layer in block.layers:
        inputs = [groups[task] for task in range(num_tasks) for _ in range(own)]
        inputs += [groups[-1]] * num_shared
        experts = [_by_hand(layer.experts, e, one) for e, one in enumerate(inputs)]
        shared = experts[num_tasks * own :]
        mixed = []
        for task in range(num_tasks):
            gate = _linear(layer.gates, task, groups[task]).softmax(dim=0)
            mine = experts[task * own : (task + 1) * own] + shared
            mixed.append(sum(g * e for g, e in zip(gate, mine, strict=True)))
        if layer.shared_gate is not None:
            gate = layer.shared_gate(groups[-1]).softmax(dim=0)
            mixed.append(sum(g * e for g, e in zip(gate, experts, strict=True)))
        groups = mixed
    return torch.stack([_logit(block.towers, task, groups[task]) for task in range(num_tasks)])


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_progressive_extraction_equals_a_loop_with_gradients(num_layers: int) -> None:
    config = ProgressiveExtractionConfig(
        num_layers=num_layers,
        num_shared_experts=3,
        num_task_experts=2,
        expert_hidden=(7, 5),
        tower_hidden=(4,),
    )
    block = ProgressiveExtraction(config, in_dim=6, num_tasks=3)
    x_BX = torch.randn(5, 6, requires_grad=True)
    weights_BT = torch.randn(5, 3)
    results = []
    for logits_BT in (block(x_BX), torch.stack([_ple_by_loop(block, config, x, 3) for x in x_BX])):
        leaves = [x_BX, *block.parameters()]
        results.append((logits_BT, torch.autograd.grad((logits_BT * weights_BT).sum(), leaves)))
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_an_expert_of_one_task_is_not_trained_by_another() -> None:
    config = ProgressiveExtractionConfig(num_layers=1, num_task_experts=2, num_shared_experts=1)
    block = ProgressiveExtraction(config, in_dim=6, num_tasks=2)
    block(torch.randn(5, 6))[:, 0].sum().backward()
    touched = block.layers[0].experts[0].weight_EDH.grad.flatten(1).any(dim=1)
    assert touched.tolist() == [True, True, False, False, True]


def test_stacked_layers_start_in_the_range_of_a_linear_layer() -> None:
    config = MixtureOfExpertsConfig(num_experts=50, expert_hidden=(64,))
    weight = MixtureOfExperts(config, in_dim=16, num_tasks=1).experts[0].weight_EDH
    assert weight.abs().max() <= 1 / math.sqrt(16)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.02)  # of a uniform


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(  # noqa: PLR0913 # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(output, Tensor):
                self.num_elements = max(self.num_elements, output.numel())
        return outputs


@pytest.mark.parametrize(
    "config",
    [
        SharedBottom(tower_hidden=(2,)),
        MixtureOfExpertsConfig(num_experts=8, expert_hidden=(2,), tower_hidden=(2,)),
        ProgressiveExtractionConfig(num_layers=2, expert_hidden=(2,), tower_hidden=(2,)),
    ],
)
def test_no_layer_has_a_representation_of_its_own_in_either_direction(
    config: SharedBottom | MixtureOfExpertsConfig | ProgressiveExtractionConfig,
) -> None:
    block, x_BX = build_heads(config, 80, 3), torch.randn(64, 80, requires_grad=True)
    with _Largest() as largest:
        block(x_BX).sum().backward()
    assert largest.num_elements == x_BX.numel()


@pytest.mark.parametrize(
    "config",
    [
        SharedBottom(dropout=0.5),
        MixtureOfExpertsConfig(dropout=0.5),
        ProgressiveExtractionConfig(dropout=0.5),
    ],
)
def test_dropout_acts_in_training_only(
    config: SharedBottom | MixtureOfExpertsConfig | ProgressiveExtractionConfig,
) -> None:
    block, x_BX = build_heads(config, 16, 2), torch.randn(8, 16)
    assert not block(x_BX).equal(block(x_BX))
    block.eval()
    assert block(x_BX).equal(block(x_BX))

"""From one representation to one logit a task: linear heads or a mixture of experts."""

# Shapes: B samples, T tasks, E experts, D width in, H width out, X width of the representation.

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranking.config import MixtureOfExpertsConfig


class StackedLinear(nn.Module):
    """E linear layers of one shape as a single batched product; initialised like `nn.Linear`."""

    def __init__(self, num_layers: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight_EDH = nn.Parameter(
            torch.empty(num_layers, in_dim, out_dim).uniform_(-bound, bound)
        )
        self.bias_E1H = nn.Parameter(torch.empty(num_layers, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x_EBD: Tensor) -> Tensor:
        """Layer e applied to x[e]: (E, B, H)."""
        return torch.baddbmm(self.bias_E1H, x_EBD, self.weight_EDH)


class MixtureOfExperts(nn.Module):
    """MMoE (doi 10.1145/3219819.3220007): shared experts, one gate and one tower a task."""

    def __init__(self, config: MixtureOfExpertsConfig, in_dim: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_experts = config.num_experts
        self.gates = nn.Linear(in_dim, num_tasks * config.num_experts)
        self.experts, expert_dim = _stack(config.num_experts, in_dim, config.expert_hidden)
        self.towers, tower_dim = _stack(num_tasks, expert_dim, config.tower_hidden)
        self.output = StackedLinear(num_tasks, tower_dim, 1)

    def forward(self, x_BX: Tensor) -> Tensor:
        """One logit a task, (B, T)."""
        x_EBX = x_BX.unsqueeze(0).expand(self.num_experts, -1, -1)
        experts_EBH = self.experts(x_EBX)
        gates_BTE = self.gates(x_BX).view(-1, self.num_tasks, self.num_experts).softmax(dim=2)
        mixed_BTH = torch.bmm(gates_BTE.to(experts_EBH.dtype), experts_EBH.transpose(0, 1))
        towers_TBH = self.towers(mixed_BTH.transpose(0, 1))
        return self.output(towers_TBH).squeeze(2).t()


def _stack(num_layers: int, in_dim: int, hidden: Sequence[int]) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for out_dim in hidden:
        layers += [StackedLinear(num_layers, in_dim, out_dim), nn.ReLU()]
        in_dim = out_dim
    return nn.Sequential(*layers), in_dim

"""From one representation to one logit a task: a linear head, towers, or experts and towers."""

# Shapes: B samples, T tasks, G groups (the tasks, then the shared one), E experts of a layer, K
# experts that one gate mixes, D width in, H width out, X width of the representation.

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranking.experts_config import (
    ExpertsConfig,
    MixtureOfExpertsConfig,
    ProgressiveExtractionConfig,
    SharedBottom,
)
from ranking.mlp import in_float32


class StackedLinear(nn.Module):
    """E linear layers of one shape as a single batched product; initialised like `nn.Linear`."""

    def __init__(self, num_layers: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight_EDH = nn.Parameter(
            torch.empty(num_layers, in_dim, out_dim).uniform_(-bound, bound)
        )
        self.bias_E1H = nn.Parameter(torch.empty(num_layers, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Layer e applied to x[e] of x (E, B, D), or to x (B, D) itself: (E, B, H)."""
        if x.dim() == 3:
            return torch.baddbmm(self.bias_E1H, x, self.weight_EDH)
        # One product of all layers side by side: the batched one of an x that is expanded has a
        # gradient of E times its size, which is then summed.
        num_layers, in_dim, out_dim = self.weight_EDH.shape
        side_by_side_DX = self.weight_EDH.transpose(0, 1).reshape(in_dim, num_layers * out_dim)
        outputs_BX = torch.addmm(self.bias_E1H.flatten(), x, side_by_side_DX)
        return outputs_BX.unflatten(1, (num_layers, out_dim)).transpose(0, 1)


class Towers(nn.Module):
    """One MLP and one logit a task."""

    def __init__(self, num_tasks: int, in_dim: int, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.hidden, out_dim = _stack(num_tasks, in_dim, hidden, dropout)
        self.output = StackedLinear(num_tasks, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One logit a task, (B, T), float32, from x (T, B, D), or (B, D) that all towers read."""
        return in_float32(self.output, self.hidden(x)).squeeze(2).t()


class SharedBottomTowers(nn.Module):
    """Shared bottom: all towers read the same representation."""

    def __init__(self, config: SharedBottom, in_dim: int, num_tasks: int) -> None:
        super().__init__()
        self.towers = Towers(num_tasks, in_dim, config.tower_hidden, config.dropout)

    def forward(self, x_BX: Tensor) -> Tensor:
        """One logit a task, (B, T)."""
        return self.towers(x_BX)


class MixtureOfExperts(nn.Module):
    """MMoE (doi 10.1145/3219819.3220007): shared experts, one gate and one tower a task."""

    def __init__(self, config: MixtureOfExpertsConfig, in_dim: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_experts = config.num_experts
        self.gates = nn.Linear(in_dim, num_tasks * config.num_experts)
        self.experts, expert_dim = _stack(
            config.num_experts, in_dim, config.expert_hidden, config.dropout
        )
        self.towers = Towers(num_tasks, expert_dim, config.tower_hidden, config.dropout)

    def forward(self, x_BX: Tensor) -> Tensor:
        """One logit a task, (B, T)."""
        experts_EBH = self.experts(x_BX)
        gates_BTE = self.gates(x_BX).view(-1, self.num_tasks, self.num_experts).softmax(dim=2)
        mixed_BTH = torch.bmm(gates_BTE.to(experts_EBH.dtype), experts_EBH.transpose(0, 1))
        return self.towers(mixed_BTH.transpose(0, 1))


class ProgressiveExtraction(nn.Module):
    """PLE (doi 10.1145/3383313.3412236): extraction layers, then one tower a task.

    layer 1, experts   click click | like like | shared shared     all read the representation
             gates       click: its own and shared | like: likewise | shared: all
    layer 2, experts   click | like | shared read what their group's gate mixed in layer 1
             gates       click | like
    towers             click | like
    """

    def __init__(self, config: ProgressiveExtractionConfig, in_dim: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        layers = []
        for layer in range(config.num_layers):
            layers.append(
                ExtractionLayer(config, in_dim, num_tasks, is_last=layer == config.num_layers - 1)
            )
            in_dim = config.expert_hidden[-1]
        self.layers = nn.ModuleList(layers)
        self.towers = Towers(num_tasks, in_dim, config.tower_hidden, config.dropout)

    def forward(self, x_BX: Tensor) -> Tensor:
        """One logit a task, (B, T)."""
        x = x_BX
        for layer in self.layers:
            x = layer(x)
        return self.towers(x)


class ExtractionLayer(nn.Module):
    """One layer of PLE; the last one has no gate for the shared group, which nobody reads."""

    def __init__(
        self, config: ProgressiveExtractionConfig, in_dim: int, num_tasks: int, *, is_last: bool
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.num_shared = config.num_shared_experts
        self.num_own = config.num_task_experts
        num_experts = num_tasks * self.num_own + self.num_shared
        self.experts, _ = _stack(num_experts, in_dim, config.expert_hidden, config.dropout)
        self.gates = StackedLinear(num_tasks, in_dim, self.num_own + self.num_shared)
        self.shared_gate = None if is_last else nn.Linear(in_dim, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """What the gates mix: (T + 1, B, H); (T, B, H) in the last layer.

        Args:
            x: what every group reads (T + 1, B, X), or (B, X) that all read.
        """
        all_the_same = x.dim() == 2
        tasks, shared_BX = (x, x) if all_the_same else (x[: self.num_tasks], x[-1])
        experts_EBH = self.experts(x if all_the_same else self._inputs(x))
        own, shared = self.num_tasks * self.num_own, self.num_shared
        own_TKBH = experts_EBH[:own].unflatten(0, (self.num_tasks, self.num_own))
        shared_TKBH = experts_EBH[own:].expand(self.num_tasks, shared, -1, -1)
        gates_TBK = self.gates(tasks).softmax(dim=2).to(experts_EBH.dtype)
        mixed_TBH = torch.einsum("tbk,tkbh->tbh", gates_TBK[..., : self.num_own], own_TKBH)
        mixed_TBH = mixed_TBH + torch.einsum(
            "tbk,tkbh->tbh", gates_TBK[..., self.num_own :], shared_TKBH
        )
        if self.shared_gate is None:
            return mixed_TBH
        gate_BE = self.shared_gate(shared_BX).softmax(dim=1).to(experts_EBH.dtype)
        mixed_BH = torch.einsum("be,ebh->bh", gate_BE, experts_EBH)
        return torch.cat([mixed_TBH, mixed_BH.unsqueeze(0)])

    def _inputs(self, x_GBX: Tensor) -> Tensor:
        """What every expert reads, (E, B, X)."""
        own_EBX = x_GBX[: self.num_tasks].repeat_interleave(self.num_own, dim=0)
        return torch.cat([own_EBX, x_GBX[-1:].expand(self.num_shared, -1, -1)])


AnyHeads = nn.Linear | SharedBottomTowers | MixtureOfExperts | ProgressiveExtraction


def build_heads(config: ExpertsConfig | None, in_dim: int, num_tasks: int) -> AnyHeads:
    """The module that maps the classifier's output to one logit a task."""
    match config:
        case None:
            return nn.Linear(in_dim, num_tasks)
        case SharedBottom():
            return SharedBottomTowers(config, in_dim, num_tasks)
        case MixtureOfExpertsConfig():
            return MixtureOfExperts(config, in_dim, num_tasks)
        case ProgressiveExtractionConfig():
            return ProgressiveExtraction(config, in_dim, num_tasks)


def _stack(
    num_layers: int, in_dim: int, hidden: Sequence[int], dropout: float
) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for out_dim in hidden:
        layers += [StackedLinear(num_layers, in_dim, out_dim), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        in_dim = out_dim
    return nn.Sequential(*layers), in_dim

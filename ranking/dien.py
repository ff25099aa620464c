"""How an interest evolved: recurrence over a jagged history, gated by the candidate."""

# Shapes: B samples, N events of all histories (packed: step after step), D dim compared with the
# candidate, S dim of side information, X width in, H hidden width, G = 3 H.

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from embedding.jagged import TimeSteps
from ranking.interest import expand, segment_softmax


class InterestEvolution(nn.Module):
    """DIEN (arXiv 1809.03672) without its auxiliary loss.

    A GRU reads the history; the candidate attends to its states; a second GRU (AUGRU) whose update
    gate is scaled by the attention weights follows only what concerns the candidate. Its last state
    is the interest. Step t computes the samples that have an event t, so nothing is padded.
    """

    def __init__(self, query_dim: int, side_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.output_dim = hidden_dim
        self.extractor = nn.GRU(query_dim + side_dim, hidden_dim)
        self.query = nn.Linear(query_dim, hidden_dim, bias=False)
        self.evolution = AttentionalGru(hidden_dim, hidden_dim)

    def forward(
        self, query_BD: Tensor, keys_ND: Tensor, side_NS: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """The interest vectors, (B, H), float32; zeros where a history is empty."""
        has_events_B1 = (lengths_B > 0).unsqueeze(1)
        lengths_B = lengths_B.long()
        if not keys_ND.shape[0]:
            # One event of zeros, which is masked below: the gradient must reach all parameters and
            # tables in every batch, or ranks whose samples have events would wait for this one.
            keys_ND, side_NS = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys_ND, side_NS))
            lengths_B = (torch.arange(len(lengths_B), device=lengths_B.device) == 0).long()
        steps = TimeSteps.of(lengths_B, keys_ND.shape[0])
        # Small products one after the other: bf16 would round the state at every step.
        with torch.autocast(query_BD.device.type, enabled=False):
            events_NX = expand(torch.cat([keys_ND, side_NS], dim=1).float(), steps.events_N)
            packed = PackedSequence(events_NX, torch.tensor(steps.sizes))
            states_NH = self.extractor(packed)[0].data
            query_NH = expand(self.query(query_BD.float()), steps.samples_N)
            scores_N = (states_NH * query_NH).sum(dim=1)
            weights_N = segment_softmax(scores_N, steps.samples_N, len(lengths_B))
            evolved_NH = self.evolution(states_NH, weights_N, steps.sizes)
            interest_BH = expand(evolved_NH, steps.last_B)
        return interest_BH * has_events_B1


class AttentionalGru(nn.Module):
    """AUGRU: a GRU whose update gate is multiplied by an attention weight."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.input = nn.Linear(in_dim, 3 * hidden_dim)
        self.state = nn.Linear(hidden_dim, 3 * hidden_dim)

    def forward(self, x_NX: Tensor, weights_N: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The state after every step, (N, H).

        Args:
            x_NX: packed events.
            weights_N: attention weight of every event.
            sizes: samples that have step 0, 1, ...; falling.
        """
        inputs = self.input(x_NX).split(sizes)
        weights = weights_N.unsqueeze(1).split(sizes)
        state_BH = x_NX.new_zeros(sizes[0], self.hidden_dim)
        states = []
        for x_BG, weight_B1 in zip(inputs, weights, strict=True):
            state_BH = self._step(x_BG, weight_B1, state_BH[: len(x_BG)])
            states.append(state_BH)
        return torch.cat(states)

    def _step(self, x_BG: Tensor, weight_B1: Tensor, state_BH: Tensor) -> Tensor:
        x_reset, x_update, x_new = x_BG.chunk(3, dim=1)
        reset, update, new = self.state(state_BH).chunk(3, dim=1)
        update_BH = weight_B1 * (x_update + update).sigmoid()
        new_BH = (x_new + (x_reset + reset).sigmoid() * new).tanh()
        return state_BH + update_BH * (new_BH - state_BH)

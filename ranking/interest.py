"""The user's interest in the candidate: target attention over a jagged history."""

# Shapes: B samples, N events of all histories, D dim compared with the candidate, S dim of side
# information without a counterpart at the candidate, H hidden width.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from embedding.jagged import segments_of
from ranking.mlp import mlp


class TargetAttention(nn.Module):
    """DIN (arXiv 1706.06978): the history summed with weights from the candidate.

        candidate   lengths   keys (N = 3)       output
        q0          2         k0 k1         ->   a(q0, k0) k0 + a(q0, k1) k1
        q1          0                            0
        q2          1         k2                 a(q2, k2) k2

    a is an MLP on [q, k, q - k, q * k] and the event's side information, which is summed along.
    Nothing is padded: cost follows N, not B times the longest history.
    """

    def __init__(
        self, query_dim: int, side_dim: int, hidden: Sequence[int], *, softmax: bool
    ) -> None:
        super().__init__()
        self.query_dim = query_dim
        self.side_dim = side_dim
        self.softmax = softmax
        self.input = nn.Linear(4 * query_dim + side_dim, hidden[0])
        self.hidden = mlp(hidden[0], hidden[1:])
        self.output = nn.Linear(hidden[-1], 1)

    @property
    def output_dim(self) -> int:
        """Width of the interest vector."""
        return self.query_dim + self.side_dim

    def forward(
        self, query_BD: Tensor, keys_ND: Tensor, side_NS: Tensor, lengths_B: Tensor
    ) -> Tensor:
        """The interest vectors, (B, D + S); zeros where a history is empty."""
        segments_N = segments_of(lengths_B, keys_ND.shape[0])
        scores_N = self._scores(query_BD, keys_ND, side_NS, segments_N)
        if self.softmax:
            scores_N = segment_softmax(scores_N, segments_N, len(lengths_B))
        events_NX = torch.cat([keys_ND, side_NS], dim=1)
        weighted_NX = events_NX * scores_N.unsqueeze(1).to(events_NX.dtype)
        return segment_sum(weighted_NX, segments_N, len(lengths_B))

    def _scores(
        self, query_BD: Tensor, keys_ND: Tensor, side_NS: Tensor, segments_N: Tensor
    ) -> Tensor:
        # The first layer on [q, k, q - k, q * k, s] is linear in each part, so the query's part is
        # computed once a sample instead of once an event, and q - k needs no product of its own.
        dim = self.query_dim
        of_q, of_k, of_difference, of_product, of_side = self.input.weight.split(
            [dim, dim, dim, dim, self.side_dim], dim=1
        )
        query_BH = nn.functional.linear(query_BD, of_q + of_difference, self.input.bias)
        product_ND = expand(query_BD, segments_N) * keys_ND
        inputs_NX = torch.cat([keys_ND, product_ND, side_NS], dim=1)
        weight_HX = torch.cat([of_k - of_difference, of_product, of_side], dim=1)
        hidden_NH = nn.functional.linear(inputs_NX, weight_HX) + expand(query_BH, segments_N)
        return self.output(self.hidden(hidden_NH.relu())).squeeze(1)


def expand(x_BD: Tensor, segments_N: Tensor) -> Tensor:
    """Row `segments_N[n]` of x for every n: (N, D). `gather`, as its backward is fast on CPU."""
    return x_BD.gather(0, segments_N.unsqueeze(1).expand(-1, x_BD.shape[1]))


def segment_sum(x_ND: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """Sum of the rows of every segment, (B, D); zeros for an empty one."""
    sums_BD = x_ND.new_zeros(num_segments, x_ND.shape[1])
    return sums_BD.scatter_add(0, segments_N.unsqueeze(1).expand_as(x_ND), x_ND)


def segment_softmax(scores_N: Tensor, segments_N: Tensor, num_segments: int) -> Tensor:
    """Softmax inside every segment, (N,), in float32."""
    scores_N = scores_N.float()
    largest_B = scores_N.new_full((num_segments,), -torch.inf)
    largest_B = largest_B.scatter_reduce(0, segments_N, scores_N.detach(), reduce="amax")
    exp_N = (scores_N - largest_B.gather(0, segments_N)).exp()
    sums_B = scores_N.new_zeros(num_segments).scatter_add(0, segments_N, exp_N)
    return exp_N / sums_B.gather(0, segments_N)

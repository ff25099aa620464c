"""Long histories: pointwise self-attention blocks over the jagged history and the candidate."""

# Shapes: B samples, N tokens of all samples, S tokens of the longest sequence of a bucket, D width
# of a token, H heads, X width of all heads, G gap buckets.

import torch
from torch import Tensor, nn

from embedding.jagged import Bucket, Kernel, SortedSamples
from ranking.interest import expand
from ranking.interest_config import Hstu


class SequenceTransduction(nn.Module):
    """HSTU (arXiv 2402.17152) with a readout that knows the candidate.

    The candidate is the last token of its sample's sequence, and attention looks back only: what
    comes out at its place is the interest. Tokens are computed in buckets of similar length.

        sample   tokens                       interest
        0        e0 e1 e2 candidate0    ->    at candidate0
        1        candidate1             ->    at candidate1: of the candidate alone
    """

    def __init__(
        self, query_dim: int, side_dim: int, config: Hstu, *, max_length: int, num_gaps: int | None
    ) -> None:
        """`max_length`: events of the longest history; `num_gaps`: rows of the gap table."""
        super().__init__()
        self.output_dim = config.dim
        self.kernel: Kernel = "fbgemm"
        self.event = nn.Linear(query_dim + side_dim, config.dim)
        self.candidate = nn.Linear(query_dim, config.dim)
        self.blocks = nn.ModuleList(
            [Block(config, max_length + 1, num_gaps) for _ in range(config.num_layers)]
        )

    def forward(
        self,
        query_BD: Tensor,
        keys_ND: Tensor,
        side_NS: Tensor,
        lengths_B: Tensor,
        gaps_N: Tensor | None = None,
    ) -> Tensor:
        """The interest vectors, (B, dim)."""
        num_events, num_samples = len(keys_ND), len(query_BD)
        num_tokens = num_events + num_samples
        lengths_B = lengths_B.long() + 1
        samples = SortedSamples.of(lengths_B)
        ends_B = samples.lengths_B.cumsum(0) - 1
        tokens_N = _tokens(lengths_B, num_events)[samples.events(lengths_B, num_tokens)]
        events_ND = self.event(torch.cat([keys_ND, side_NS], dim=1))
        x_ND = expand(torch.cat([events_ND, self.candidate(query_BD)]), tokens_N)
        if gaps_N is not None:
            # The candidate comes 0 seconds before itself: raw gap 0, which is row 1.
            gaps_N = torch.cat([gaps_N, gaps_N.new_ones(num_samples)])[tokens_N]
        for block in self.blocks:
            x_ND = block(x_ND, samples.buckets, gaps_N, self.kernel)
        places_B = torch.empty_like(ends_B)
        places_B[samples.order_B] = ends_B
        return expand(x_ND, places_B)


class Block(nn.Module):
    """One HSTU block: SiLU(q k + bias) / n instead of softmax, its sum gated by u.

    Without a softmax the strength of an interest survives: ten similar events weigh more than one.
    """

    def __init__(self, config: Hstu, num_positions: int, num_gaps: int | None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_positions = num_positions
        width = config.num_heads * config.head_dim
        self.norm = nn.LayerNorm(config.dim)
        self.projections = nn.Linear(config.dim, 4 * width)
        self.position_bias_HS = nn.Parameter(torch.zeros(config.num_heads, num_positions))
        self.gap_bias_HGG = (
            None
            if num_gaps is None
            else nn.Parameter(torch.zeros(config.num_heads, num_gaps, num_gaps))
        )
        self.attended_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_ND: Tensor, buckets: tuple[Bucket, ...], gaps_N: Tensor | None, kernel: Kernel
    ) -> Tensor:
        """The tokens after the block, (N, D)."""
        projected_NX = nn.functional.silu(self.projections(self.norm(x_ND)))
        gate_NX, qkv_NX = projected_NX.tensor_split([projected_NX.shape[1] // 4], dim=1)
        sizes = [bucket.num_events for bucket in buckets]
        gaps = [None] * len(sizes) if gaps_N is None else gaps_N.split(sizes)
        attended_NX = torch.cat(
            [
                bucket.unpad(self._attend(bucket.pad(part_NX, kernel), bucket, gap_N), kernel)
                for bucket, part_NX, gap_N in zip(buckets, qkv_NX.split(sizes), gaps, strict=True)
            ]
        )
        return x_ND + self.dropout(self.output(self.attended_norm(attended_NX) * gate_NX))

    def _attend(self, qkv_BSX: Tensor, bucket: Bucket, gaps_N: Tensor | None) -> Tensor:
        """Attention inside one bucket, (B, S, X).

        Padding needs no mask: its values are 0, and it comes behind every real token.
        """
        q, k, v = qkv_BSX.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores_BHSS = q @ k.transpose(2, 3) + self._position_bias(bucket.longest)
        if gaps_N is not None:
            scores_BHSS = scores_BHSS + self._gap_bias(bucket, gaps_N)
        weights_BHSS = nn.functional.silu(scores_BHSS).tril() / self.num_positions
        return (weights_BHSS.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def _position_bias(self, length: int) -> Tensor:
        """Bias of every distance i - j, (H, S, S); the largest one stands for all beyond."""
        positions_S = torch.arange(length, device=self.position_bias_HS.device)
        distances_SS = positions_S.unsqueeze(1) - positions_S
        distances_SS = distances_SS.clamp(min=0, max=self.num_positions - 1)
        return self.position_bias_HS[:, distances_SS]

    def _gap_bias(self, bucket: Bucket, gaps_N: Tensor) -> Tensor:
        """Bias of every pair of gaps, (B, H, S, S): two products instead of S x S look-ups."""
        assert self.gap_bias_HGG is not None
        num_gaps = self.gap_bias_HGG.shape[1]
        one_hot_NG = nn.functional.one_hot(gaps_N, num_gaps).to(self.gap_bias_HGG.dtype)
        one_hot_BSG = bucket.pad(one_hot_NG, "torch").unsqueeze(1)
        return one_hot_BSG @ self.gap_bias_HGG @ one_hot_BSG.transpose(2, 3)


def _tokens(lengths_B: Tensor, num_events: int) -> Tensor:
    """Index into [events; candidates] of every token, in the samples' order; (N,).

    `lengths_B` counts the candidate.
    """
    num_samples = len(lengths_B)
    tokens_N = torch.empty(num_events + num_samples, dtype=torch.int64, device=lengths_B.device)
    ends_B = lengths_B.cumsum(0) - 1
    is_event_N = torch.ones_like(tokens_N, dtype=torch.bool).index_fill_(0, ends_B, value=False)
    tokens_N = is_event_N.cumsum(0) - 1
    samples_B = torch.arange(num_samples, device=lengths_B.device)
    return tokens_N.index_copy_(0, ends_B, num_events + samples_B)

"""Tokens of several modalities -> one vector an item: FQ-Former, and two plainer ways.

All of them read a modality only where the item has it: what lies at masked positions, and in
the place of an absent modality, never changes a result.

Shapes: U unique items, L token positions, H width of a tower, D content dim, Q query tokens,
J = Q + all modalities' positions (the joint sequence), N heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from multimodal.content_config import ConcatFusion, FqFormer, Fusion, MeanFusion
from multimodal.token_batch import ModalityTokens

Tokens = Mapping[str, ModalityTokens]


def build_fusion(fusion: Fusion, widths: Mapping[str, int], dim: int) -> "FusionModule":
    """The fusion that the recipe asks for, with random weights.

    Args:
        fusion: the recipe's.
        widths: H by modality.
        dim: D.
    """
    match fusion:
        case FqFormer():
            return FusionQFormer(fusion, widths, fusion.dim or dim)
        case MeanFusion():
            return MeanOfModalities(widths, dim)
        case ConcatFusion():
            return ConcatOfModalities(widths)


class FusionQFormer(nn.Module):
    """Learned queries P and the projected tokens X attend to one another as [P ; X].

    The first Q positions of the last layer, side by side, are the output (Q * D). EM3,
    arXiv 2404.06078. An option of ours adds the mean token of every modality (sum of H).
    """

    def __init__(self, config: FqFormer, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.means = ConcatOfModalities(widths) if config.mean_tokens else None
        self.width = config.num_queries * dim + (self.means.width if self.means else 0)
        self.queries_QD = nn.Parameter(torch.empty(config.num_queries, dim))
        nn.init.xavier_uniform_(self.queries_QD)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim) for name, width in widths.items()}
        )
        self.modalities = nn.ParameterDict()
        if config.modality_embedding:
            self.modalities.update({name: nn.Parameter(torch.zeros(dim)) for name in widths})
        self.layers = nn.ModuleList(
            FqLayer(dim, config.num_heads, config.dropout, feed_forward=config.feed_forward)
            for _ in range(config.num_layers)
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """(U, Q * D), and the mean tokens beside it."""
        parts, masks = [], []
        for name, projection in self.projections.items():
            part_ULD = projection(_normed(tokens[name].tokens_ULH))
            if name in self.modalities:
                part_ULD = part_ULD + self.modalities[name]
            parts.append(part_ULD)
            masks.append(tokens[name].mask_UL)
        queries_UQD = self.queries_QD.expand(len(masks[0]), -1, -1)
        joint_UJD = torch.cat([queries_UQD, *parts], dim=1)
        # Queries can always be read, so no row of the attention is empty.
        mask_UJ = torch.cat([torch.ones_like(queries_UQD[..., 0], dtype=torch.bool), *masks], dim=1)
        num_queries = len(self.queries_QD)
        for number, layer in enumerate(self.layers, start=1):
            # Nobody reads the other positions of the last layer.
            wanted = num_queries if number == len(self.layers) else joint_UJD.shape[1]
            joint_UJD = layer(joint_UJD, mask_UJ, wanted)
        queried_UX = joint_UJD.flatten(start_dim=1)
        if self.means is None:
            return queried_UX
        return torch.cat([queried_UX, self.means(tokens).to(queried_UX.dtype)], dim=1)

    def columns_present(self, tokens: Tokens) -> Tensor:
        """(U, width) False where nothing of the item is read."""
        queried_UX = _any_present(tokens, self.queries_QD.numel())
        if self.means is None:
            return queried_UX
        return torch.cat([queried_UX, self.means.columns_present(tokens)], dim=1)

    def replace_absent(self, vector_X: Tensor, where_X: Tensor) -> None:
        """Where a learned vector stands for an absent modality, let it be these columns (width).

        Only those where `where_X` (width) is True.
        """
        if self.means is not None:
            first = self.queries_QD.numel()
            self.means.replace_absent(vector_X[first:], where_X[first:])


class FqLayer(nn.Module):
    """Self-attention, residual, LayerNorm; optionally a feed-forward block of the same kind."""

    def __init__(self, dim: int, num_heads: int, dropout: float, *, feed_forward: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        # Softmax cancels a bias of keys, and that of values adds to the output's: such a weight
        # would drift on rounding noise.
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward: nn.Module | None = None
        if feed_forward:
            self.feed_forward = nn.Sequential(
                nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
            )
            self.feed_forward_norm = nn.LayerNorm(dim)

    def forward(self, joint_UJD: Tensor, mask_UJ: Tensor, wanted: int) -> Tensor:
        """The first `wanted` positions (U, wanted, D), attending to all that `mask_UJ` allows."""
        asking_UWD = joint_UJD[:, :wanted]
        key_UJD, value_UJD = self.key_value(joint_UJD).chunk(2, dim=-1)
        attended_UNWd = functional.scaled_dot_product_attention(
            self._heads(self.query(asking_UWD)),
            self._heads(key_UJD),
            self._heads(value_UJD),
            attn_mask=mask_UJ[:, None, None, :],
        )
        attended_UWD = attended_UNWd.transpose(1, 2).flatten(start_dim=2)
        asking_UWD = self.norm(asking_UWD + self.dropout(self.output(attended_UWD)))
        if self.feed_forward is not None:
            asking_UWD = self.feed_forward_norm(asking_UWD + self.feed_forward(asking_UWD))
        return asking_UWD

    def _heads(self, x_UJD: Tensor) -> Tensor:
        return x_UJD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MeanOfModalities(nn.Module):
    """Mean over the item's modalities of the mean of their projected tokens (D)."""

    def __init__(self, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.width = dim
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim) for name, width in widths.items()}
        )
        self.absent_D = nn.Parameter(torch.zeros(dim))
        """Of items that have none."""

    def forward(self, tokens: Tokens) -> Tensor:
        """(U, D)."""
        total_UD, count_U1 = torch.zeros(()), torch.zeros(())
        for name, projection in self.projections.items():
            present_U1 = tokens[name].present.unsqueeze(1)
            normed = ModalityTokens(_normed(tokens[name].tokens_ULH), tokens[name].mask_UL)
            # The mean first: projecting is linear, and there are L times fewer rows behind.
            vector_UD = projection(mean_token(normed))
            total_UD = total_UD + vector_UD * present_U1
            count_U1 = count_U1 + present_U1
        return torch.where(count_U1 > 0, total_UD / count_U1.clamp(min=1), self.absent_D)

    def columns_present(self, tokens: Tokens) -> Tensor:
        """(U, width) False where nothing of the item is read."""
        return _any_present(tokens, self.width)

    def replace_absent(self, vector_X: Tensor, where_X: Tensor) -> None:
        """Nothing: items that lack one modality read the other, and `absent_D` has no start."""


class ConcatOfModalities(nn.Module):
    """The mean token of every modality, side by side; an absent one is a learned vector."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.absent_H = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(width)) for name, width in widths.items()}
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """(U, sum of H)."""
        vectors = [
            torch.where(tokens[name].present.unsqueeze(1), mean_token(tokens[name]), absent_H)
            for name, absent_H in self.absent_H.items()
        ]
        return torch.cat(vectors, dim=1)

    def columns_present(self, tokens: Tokens) -> Tensor:
        """(U, width) False where an absent modality's learned vector stands."""
        parts = [
            tokens[name].present.unsqueeze(1).expand(-1, len(absent_H))
            for name, absent_H in self.absent_H.items()
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def replace_absent(self, vector_X: Tensor, where_X: Tensor) -> None:
        """Let absent modalities be these columns (width) where `where_X` (width) is True."""
        own_X = torch.cat([*self.absent_H.values()])
        replaced_X = torch.where(where_X, vector_X, own_X)
        widths = [len(absent_H) for absent_H in self.absent_H.values()]
        for absent_H, part in zip(self.absent_H.values(), replaced_X.split(widths), strict=True):
            absent_H.copy_(part)


FusionModule = FusionQFormer | MeanOfModalities | ConcatOfModalities


def _any_present(tokens: Tokens, width: int) -> Tensor:
    """(U, width) True for items that have any modality."""
    present_U = torch.stack([part.present for part in tokens.values()]).any(dim=0)
    return present_U.unsqueeze(1).expand(-1, width)


def _normed(tokens_ULH: Tensor) -> Tensor:
    """Tokens at one scale, so that no modality drowns another: towers differ in it several times.

    As BLIP-2 does before its Q-Former (arXiv 2301.12597), but without weights.
    """
    return functional.layer_norm(tokens_ULH, tokens_ULH.shape[-1:])


def mean_token(tokens: ModalityTokens) -> Tensor:
    """Mean of an item's tokens (U, H); zeros where there are none."""
    weight_UL = tokens.mask_UL.to(tokens.tokens_ULH.dtype)
    weight_UL = weight_UL / weight_UL.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("ulh,ul->uh", tokens.tokens_ULH, weight_UL)

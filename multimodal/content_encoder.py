"""Content encoder: lower-layer tokens -> upper layers with LoRA -> fusion -> content vectors.

Trained by the ranking loss. Everything else in it is frozen, and what trains is small: LoRA,
projections, fusion and the last linear layer.

Shapes: U unique items, L token positions, H width of a tower, D content dim.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedding.errors import UserError
from multimodal.content_config import ContentConfig
from multimodal.fusion import build_fusion
from multimodal.rank_group import RankGroup
from multimodal.standardised import StandardisedLinear
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.towers import UpperTower, load_tower, merge_lora

ReadTokens = Callable[[Tensor], TokenBatch]
"""Stored tokens of some rows (int64, on the CPU)."""

_MOST_STANDARDISED = 20_000
_ITEMS_PER_CHUNK = 256


class ContentEncoder(nn.Module):
    """Content vectors of items, from their stored tokens.

    Args:
        config: the recipe's.
        towers: upper part of each modality that the config sets.
    """

    def __init__(self, config: ContentConfig, towers: Mapping[str, UpperTower]) -> None:
        super().__init__()
        self.micro_batch_items = config.gradient.micro_batch_items
        # Of the config's order: the modalities' own must not matter.
        self.towers = nn.ModuleDict({name: towers[name] for name in config.towers})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            widths = {name: towers[name].hidden_size for name in config.towers}
            self.fusion = build_fusion(config.fusion, widths, config.dim)
            self.output = StandardisedLinear(self.fusion.width, config.dim)
        if config.frozen:
            self.fusion.requires_grad_(False)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Content vectors (U, D), with gradient where it is enabled.

        Raises:
            UserError: the tokens are not those of these towers.
        """
        vectors_UD: Tensor = self.output(self.fused(batch))
        return vectors_UD

    def fused(self, batch: TokenBatch) -> Tensor:
        """What the last linear layer reads (U, width of the fusion).

        Of micro batches, one at a time is on the encoder's device, from wherever the tokens lie.

        Raises:
            UserError: the tokens are not those of these towers.
        """
        weight = self.output.weight
        if not batch.num_items:
            return weight.new_zeros(0, self.output.in_features)
        size = self.micro_batch_items
        if size is None or batch.num_items <= size:
            return self._fused(weight, batch)
        if not torch.is_grad_enabled():
            return torch.cat([self._fused(weight, piece) for piece in batch.split(size)])
        # Memory holds the activations of one piece, not of all: backward computes them again.
        pieces = [
            checkpoint(self._fused, weight, piece, use_reentrant=False)
            for piece in batch.split(size)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def moments(self, read: ReadTokens, rows_N: Tensor) -> Tensor:
        """Count, sum and sum of squares of what the last layer reads: (3, H), float64.

        Of the items that have the modality, so moments of parts of a catalogue add up.
        """
        moments_3H = self.output.mean_H.new_zeros(3, self.output.in_features, dtype=torch.float64)
        self.eval()
        for chunk in rows_N.split(_ITEMS_PER_CHUNK):
            batch = read(chunk).to(moments_3H.device)
            present_UH = self.fusion.columns_present(batch.modalities)
            fused_UH = self.fused(batch).double() * present_UH
            moments_3H += torch.stack(
                [present_UH.sum(0), fused_UH.sum(0), fused_UH.square().sum(0)]
            )
        return moments_3H

    def standardise(self, moments_3H: Tensor) -> None:
        """Give the last layer inputs of mean 0 and deviation 1 over the items of `moments`.

        Items that lack a modality start from its mean: 0 once it is standardised.
        """
        self.output.standardise(moments_3H)
        self.replace_absent()

    def replace_absent(self) -> None:
        """Where a learned vector stands for an absent modality, let it be that one's mean."""
        everywhere_H = torch.ones_like(self.output.mean_H, dtype=torch.bool)
        self.fusion.replace_absent(self.output.mean_H, everywhere_H)

    def wake(self, mean_H: Tensor, deviation_H: Tensor) -> None:
        """Give the last layer these moments of inputs that were constant when it took its own."""
        wakes_H = self.output.wake(mean_H, deviation_H)
        self.fusion.replace_absent(self.output.mean_H, wakes_H)

    def _fused(self, like: Tensor, batch: TokenBatch) -> Tensor:
        """(U, width of the fusion), made on the device of `like`.

        It is an argument so that a checkpoint knows the device, whose generator it sets back before
        dropout is drawn again.
        """
        batch = batch.to(like.device)
        tokens = {name: self._upper(name, batch.modalities[name]) for name in self.towers}
        fused_UH: Tensor = self.fusion(tokens)
        return fused_UH

    def _upper(self, name: str, part: ModalityTokens) -> ModalityTokens:
        tower = self.towers[name]
        assert isinstance(tower, UpperTower)
        if part.tokens_ULH.shape[-1] != tower.hidden_size:
            raise UserError(
                f"{name} tokens have {part.tokens_ULH.shape[-1]} columns, but the {name} tower has "
                f"hidden size {tower.hidden_size}: they come from another model; run the content "
                "stage of this recipe"
            )
        # Zeros where there is no token: even a NaN there must not reach a gradient.
        readable_ULH = part.tokens_ULH.to(self.output.weight.dtype).masked_fill(
            ~part.mask_UL.unsqueeze(-1), 0.0
        )
        final_ULH = tower(readable_ULH, part.mask_UL)
        return ModalityTokens(final_ULH, part.mask_UL)


def load_content_encoder(config: ContentConfig) -> ContentEncoder:
    """The encoder before training: pretrained upper layers, LoRA and fusion as initialised.

    Equal wherever it is built. The lower layers are read and dropped.

    Raises:
        UserError: a tower cannot be loaded or adapted.
    """
    towers = {
        name: load_tower(tower, seed=config.seed).upper for name, tower in config.towers.items()
    }
    return ContentEncoder(config, towers)


def rows_to_standardise(num_items: int, seed: int) -> Tensor:
    """Rows of a store whose moments stand for its items, ascending: all, or a large sample."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_items, generator=generator)[:_MOST_STANDARDISED].sort().values


def standardise_on_ranks(
    encoder: ContentEncoder, read: ReadTokens, num_items: int, seed: int, ranks: RankGroup
) -> None:
    """Standardise every rank's replica over a store's items; each goes through its share of them.

    Args:
        encoder: a rank's, equal on all of them.
        read: stored tokens.
        num_items: of the store.
        seed: of the sample of a large one.
        ranks: all of them call it.
    """
    moments_3H = encoder.moments(read, ranks.share(rows_to_standardise(num_items, seed)))
    ranks.add_up(moments_3H)
    encoder.standardise(moments_3H)


def trained_state(encoder: ContentEncoder) -> dict[str, Tensor]:
    """What training changes and standardises, by name: pretrained weights have their own files."""
    trained = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
    return trained | {f"output.{name}": buffer for name, buffer in encoder.output.named_buffers()}


def load_trained_state(encoder: ContentEncoder, state: Mapping[str, Tensor]) -> None:
    """Put a `trained_state` into an encoder of the same config, in place.

    Raises:
        UserError: it is another encoder's.
    """
    own = trained_state(encoder)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != theirs:
        wrong = sorted(n for n in shapes.keys() | theirs.keys() if shapes.get(n) != theirs.get(n))
        raise UserError(
            f"the checkpoint's content encoder is not this recipe's: {', '.join(wrong[:4])} differ "
            f"({len(wrong)} in all); restore the content settings it was trained with"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
    if not any(parameter.requires_grad for parameter in encoder.fusion.parameters()):
        encoder.replace_absent()


def load_moments(encoder: ContentEncoder, state: Mapping[str, Tensor]) -> None:
    """Standardise a new encoder as the one of a `trained_state` was before its training.

    Training never changes these moments, so the two start equal.
    """
    for name, buffer in encoder.output.named_buffers():
        buffer.copy_(state[f"output.{name}"])
    encoder.replace_absent()


def merged(encoder: ContentEncoder) -> ContentEncoder:
    """A copy for inference, with LoRA folded into the weights: the same vectors, no adapters."""
    plain = copy.deepcopy(encoder).requires_grad_(False).eval()
    merge_lora(plain)
    return plain

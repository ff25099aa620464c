"""The content encoder on the training ranks: each encodes its share of a step's distinct items."""

# Shapes: G items encoded in a step by all ranks, H width of the fused vectors, R rows of the store,
# P elements of all parameters.

from collections.abc import Mapping

import torch
from torch import Tensor

from multimodal.content_learner import ContentLearner
from multimodal.rank_group import RankGroup


class InlineEncoder:
    """A `multimodal.content_source.EncoderPlacement`: replicas that share the work of a step.

    Vectors of the shares are gathered to all ranks; the ranks' gradients of all vectors are added,
    each rank goes backward through its share, and the gradients of the parameters are added. So
    items are encoded once, not once a rank, and all replicas take the same step.
    """

    def __init__(self, learner: ContentLearner, ranks: RankGroup) -> None:
        self._learner = learner
        self._ranks = ranks
        self._shares: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}

    def head(self) -> dict[str, Tensor]:
        """That of any replica."""
        return self._learner.head()

    def request(self, step: int, rows_G: Tensor) -> None:
        """Encode the rows of a step."""
        share = self._ranks.share(rows_G)
        own_UH = self._learner.start(step, share, keep_graph=True)
        self._shares[step] = share
        self._vectors[step] = self._ranks.gather(own_UH, len(rows_G))

    def vectors(self, step: int) -> Tensor:
        """What was requested, (G, H)."""
        return self._vectors.pop(step)

    def learn(self, step: int, gradient_GH: Tensor, rate_factor: float) -> None:
        """Update from the mean over ranks of the gradients of a step's vectors."""
        self._ranks.add_up(gradient_GH)
        own_UH = self._ranks.share(gradient_GH) / self._ranks.world_size
        self._learner.finish(step, self._shares.pop(step), own_UH)
        gradient_P = self._learner.gradient()
        self._ranks.add_up(gradient_P)
        self._learner.update(gradient_P, rate_factor)

    def encode_all(self, num_rows: int, *, exact: bool) -> Tensor:
        """Vectors of all rows, (R, H)."""
        rows = torch.arange(num_rows, device=self._learner.device)
        own_UH = self._learner.encode(self._ranks.share(rows), exact=exact)
        return self._ranks.gather(own_UH, num_rows)

    def state(self) -> dict[str, Tensor]:
        """That of any replica."""
        return self._learner.state()

    def load(self, tensors: Mapping[str, Tensor], *, wakes: bool = False) -> None:
        """Into this rank's replica."""
        self._learner.load(tensors, wakes=wakes)

    def gradient_norms(self) -> dict[str, float]:
        """Of the last step."""
        return self._learner.gradient_norms()

    def close(self, *, is_orderly: bool) -> None:
        """Nothing lives outside this process."""

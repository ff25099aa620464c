"""What the ranker reads of item content: the candidate's vector, and the user's interest in it.

Content comes as tensors with gradient, one vector a distinct item; who made them is not known here.
"""

# Shapes: B samples, N events of all histories, U distinct items, D content dim, A attention dim,
# X any width.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from embedding.batch import RankingBatch
from embedding.items import ContentVectors, ItemHistory, ItemRows
from embedding.jagged import segments_of
from embedding.tables import EmbeddedBatch
from ranking.interest import expand, segment_softmax, segment_sum

PENALTY = "content_penalty"
"""Name of the `ContentPenalty` in a training step."""
_PAIRS_PER_EVENT = 8
"""With at most so many (sample, item) pairs an event, products over all pairs are cheaper than a
gather for every event."""


@dataclass(frozen=True)
class ContentShape:
    """What content a model reads."""

    dim: int
    histories: tuple[str, ...] = ()
    """Histories whose items' content is attended over."""

    @property
    def num_fields(self) -> int:
        """Fields that it gives a classifier which multiplies fields."""
        return 1 + len(self.histories)


class ContentSource(Protocol):
    """Makes the content vectors of batches and learns from their gradients.

    Every rank makes the same calls in the same order.
    """

    def ahead(self, batches: Iterator[RankingBatch]) -> Iterator[RankingBatch]:
        """The same batches; the source may look at what comes next."""
        ...

    def train(self, items: ItemRows) -> ContentVectors:
        """Vectors for a training step; they require gradient."""
        ...

    def learn(self, rate_factor: float) -> None:
        """Update from the gradient of the vectors that `train` gave last.

        Args:
            rate_factor: on the learning rates, as the schedule has it.
        """

    def refresh(self) -> None:
        """Bring what `read` gives up to the present weights."""

    def read(self, items: ItemRows) -> ContentVectors:
        """Vectors without gradient, for validation and prediction."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures `content/...` of the steps since the last call."""
        ...


class ContentPort(nn.Module):
    """Lets a model ask its source. Holds no table: a leaf for the tracing of TorchRec's pipelines.

    The source is no module: what it trains is not sharded, replicated or saved with the model.
    """

    def __init__(self, source: ContentSource) -> None:
        super().__init__()
        self.source = source

    def forward(self, batch: RankingBatch) -> ContentVectors:
        """The content of the batch's items."""
        assert batch.content is not None, "the loader was not told to name the items of batches"
        return (
            self.source.train(batch.content) if self.training else self.source.read(batch.content)
        )


class ContentLoss(Protocol):
    """A module that compares content with ids."""

    def __call__(self, content_BD: Tensor, ids_BX: Tensor, rows_B: Tensor) -> Tensor:
        """A scalar; `rows_B` are equal for equal items of one run."""
        ...

    def forget(self) -> None:
        """Let go of earlier steps: they were of a run whose rows are other items."""


class ContentPenalty(nn.Module):
    """A loss between the candidates' content and the embedding of their ids. A leaf, too."""

    def __init__(self, loss: ContentLoss, field: str) -> None:
        """`field` looks up the item id."""
        super().__init__()
        self.loss = loss
        self.field = field

    def forward(self, content: ContentVectors, embedded: EmbeddedBatch) -> Tensor:
        """The weighted loss of one batch."""
        items = content.items
        candidates_BD = expand(content.vectors_UD, items.candidate_B)
        rows_B = items.rows_U[items.candidate_B]
        return self.loss(candidates_BD, embedded.field(self.field), rows_B)


@dataclass(frozen=True)
class ContentPart:
    """What a training step needs beside the model to learn from content."""

    source: ContentSource
    penalty: ContentPenalty | None = None


class ContentInterest(nn.Module):
    """The candidate's content, and target attention over the content of every history.

    Output per sample: [c | a_1 | c * a_1 | a_2 | ...] with the candidate's vector c and, for each
    history h, a_h = sum of softmax(<W_q c, W_k v> / sqrt(D)) v over its events. All vectors are
    layer-normed, and W_q, W_k start as the identity: attention starts as the likeness of content.
    Keys are projected once an item, and nothing is padded.
    """

    def __init__(self, shape: ContentShape, field_dim: int | None) -> None:
        """With `field_dim`, c and every a_h are fields of that dim, too."""
        super().__init__()
        self.histories = shape.histories
        self.dim = shape.dim
        self.norm = nn.LayerNorm(shape.dim)
        self.queries = nn.ModuleDict({name: _identity(shape.dim) for name in shape.histories})
        self.keys = nn.ModuleDict({name: _identity(shape.dim) for name in shape.histories})
        self.field_dim = field_dim
        self.to_fields = nn.ModuleList(
            nn.Linear(shape.dim, field_dim)
            for _ in range(shape.num_fields)
            if field_dim is not None
        )

    @property
    def output_dim(self) -> int:
        """Width of the columns."""
        return self.dim * (1 + 2 * len(self.histories))

    @property
    def output_fields(self) -> tuple[tuple[str, int], ...]:
        """(name, dim) of the fields."""
        if self.field_dim is None:
            return ()
        names = ("content", *(f"content_of_{name}" for name in self.histories))
        return tuple((name, self.field_dim) for name in names)

    def forward(self, content: ContentVectors) -> tuple[Tensor, Tensor]:
        """Columns (B, output_dim), and the fields side by side, (B, X)."""
        items = content.items
        vectors_UD = self.norm(content.vectors_UD)
        candidates_BD = expand(vectors_UD, items.candidate_B)
        columns, vectors = [candidates_BD], [candidates_BD]
        for name in self.histories:
            interest_BD = attend(
                self.queries[name](candidates_BD) * self.dim**-0.5,
                self.keys[name](vectors_UD),
                vectors_UD,
                items.histories[name],
            )
            columns += [interest_BD, candidates_BD * interest_BD]
            vectors.append(interest_BD)
        fields = [layer(v_BD) for layer, v_BD in zip(self.to_fields, vectors, strict=False)]
        fields_BX = torch.cat(fields, dim=1) if fields else candidates_BD[:, :0]
        return torch.cat(columns, dim=1), fields_BX


def attend(query_BA: Tensor, keys_UA: Tensor, values_UD: Tensor, history: ItemHistory) -> Tensor:
    """Softmax attention of every sample over the items of its history, (B, D); zeros for no event.

    Two ways to the same: over all pairs of sample and item, where items are few for the number of
    events, so that cost hardly grows with the length of histories; else event by event.
    """
    num_samples, num_items, num_events = len(query_BA), len(keys_UA), len(history.items_N)
    segments_N = segments_of(history.lengths_B, num_events)
    if num_samples * num_items > _PAIRS_PER_EVENT * num_events:
        keys_NA = expand(keys_UA, history.items_N)
        scores_N = (expand(query_BA, segments_N) * keys_NA).sum(dim=1)
        weights_N = segment_softmax(scores_N, segments_N, num_samples).to(values_UD.dtype)
        events_ND = expand(values_UD, history.items_N)
        return segment_sum(events_ND * weights_N.unsqueeze(1), segments_N, num_samples)
    pairs_N = segments_N * num_items + history.items_N
    scores_N = (query_BA @ keys_UA.T).flatten().gather(0, pairs_N)
    weights_N = segment_softmax(scores_N, segments_N, num_samples).to(values_UD.dtype)
    # An item that occurs twice in a history gets the sum of both weights.
    weights = values_UD.new_zeros(num_samples * num_items).scatter_add(0, pairs_N, weights_N)
    return weights.view(num_samples, num_items) @ values_UD


def _identity(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(layer.weight)
    return layer

"""Content-ID-contrastive loss: an item's content vector should find its own ID embedding.

    z_c = norm(W_c c),  z_d = norm(W_d d)
    L_c2i = -log( e^(z_c.z_d / t) / (e^(z_c.z_d / t) + sum over negatives j of e^(z_c.z_dj / t)) )

L_i2c has the roles exchanged, and the loss is their mean over the step's distinct items. Both sides
get gradient; through the ID embedding it reaches the rows of the (sharded) item table.
"""

# Shapes: B samples, U distinct items of them, D content dim, X width of an ID embedding,
# K negatives, M items of the queue.

import torch
from torch import Tensor, nn
from torch.nn import functional

from multimodal.content_config import Cic

NO_ITEM = -1
"""Row of a sample whose item has no known content: it takes no part."""


class CicLoss(nn.Module):
    """The weighted loss of a batch's candidates.

    The positive is never among its negatives, however often its item occurs in the batch. With
    `queue`, negatives are vectors of earlier steps and get no gradient.
    """

    queue_content_MD: Tensor
    queue_ids_MD: Tensor
    queue_rows_M: Tensor
    queue_end: Tensor
    """Items that ever entered."""

    def __init__(self, config: Cic, content_dim: int, id_dim: int) -> None:
        super().__init__()
        self.config = config
        self.content_head = nn.Linear(content_dim, content_dim, bias=False)
        self.id_head = nn.Linear(id_dim, content_dim, bias=False)
        if config.negatives == "queue":
            size = config.queue_size
            self.register_buffer("queue_content_MD", torch.zeros(size, content_dim))
            self.register_buffer("queue_ids_MD", torch.zeros(size, content_dim))
            self.register_buffer("queue_rows_M", torch.full((size,), NO_ITEM))
            self.register_buffer("queue_end", torch.zeros((), dtype=torch.int64))

    def forward(self, content_BD: Tensor, ids_BX: Tensor, rows_B: Tensor) -> Tensor:
        """The weighted loss, a scalar.

        Args:
            content_BD: content vectors of the candidates.
            ids_BX: their ID embeddings.
            rows_B: their items, as any number that is equal for equal items until `forget`.
        """
        first_U = _first_of_each(rows_B)
        rows_U = rows_B[first_U]
        content_UD = functional.normalize(self.content_head(content_BD[first_U]), dim=1)
        ids_UD = functional.normalize(self.id_head(ids_BX[first_U]), dim=1)
        match self.config.negatives:
            case "in_batch":
                loss = self._in_batch(content_UD, ids_UD)
            case "uniform":
                loss = self._uniform(content_UD, ids_UD)
            case "queue":
                loss = self._queue(content_UD, ids_UD, rows_U)
                if self.training:
                    self._enqueue(content_UD.detach(), ids_UD.detach(), rows_U)
        return self.config.weight * loss

    def forget(self) -> None:
        """Empty the queue: its rows are those of one run's items."""
        if self.config.negatives == "queue":
            self.queue_rows_M.fill_(NO_ITEM)
            self.queue_end.zero_()

    def _in_batch(self, content_UD: Tensor, ids_UD: Tensor) -> Tensor:
        similarity_UU = content_UD @ ids_UD.T / self.config.temperature
        own_U = similarity_UU.diagonal()
        return _mean(similarity_UU.logsumexp(1) + similarity_UU.logsumexp(0) - 2 * own_U) / 2

    def _uniform(self, content_UD: Tensor, ids_UD: Tensor) -> Tensor:
        num_items, device = len(content_UD), content_UD.device
        num_negatives = self.config.num_negatives if num_items > 1 else 0
        # A step of 1 .. U - 1 to the right never ends at the item itself.
        step_UK = torch.randint(1, max(num_items, 2), (num_items, num_negatives), device=device)
        place_U1 = torch.arange(num_items, device=device).unsqueeze(1)
        negative_UK = (place_U1 + step_UK) % max(num_items, 1)
        # Look-ups, not indexing: their backward adds rows up without sorting them.
        content_UKD, ids_UKD = (
            functional.embedding(negative_UK, table_UD) for table_UD in (content_UD, ids_UD)
        )
        return self._against(content_UD, ids_UD, content_UKD, ids_UKD)

    def _queue(self, content_UD: Tensor, ids_UD: Tensor, rows_U: Tensor) -> Tensor:
        drawn_UK = torch.rand(len(rows_U), self.config.num_negatives, device=rows_U.device)
        num_filled = self.queue_end.clamp(max=self.config.queue_size)
        negative_UK = (drawn_UK * num_filled).long()
        found_UK = self.queue_rows_M[negative_UK]
        is_none_UK = (found_UK == NO_ITEM) | (found_UK == rows_U.unsqueeze(1))
        return self._against(
            content_UD,
            ids_UD,
            self.queue_content_MD[negative_UK],
            self.queue_ids_MD[negative_UK],
            is_none_UK,
        )

    def _against(
        self,
        content_UD: Tensor,
        ids_UD: Tensor,
        content_UKD: Tensor,
        ids_UKD: Tensor,
        is_none_UK: Tensor | None = None,
    ) -> Tensor:
        """The loss with K negatives an item, of which those marked do not count."""
        own_U1 = (content_UD * ids_UD).sum(dim=1, keepdim=True)
        total_U = content_UD.new_zeros(len(content_UD))
        for asking_UD, negatives_UKD in ((content_UD, ids_UKD), (ids_UD, content_UKD)):
            scores_UK = torch.einsum("ud,ukd->uk", asking_UD, negatives_UKD)
            if is_none_UK is not None:
                scores_UK = scores_UK.masked_fill(is_none_UK, -torch.inf)
            scores_UK = torch.cat([own_U1, scores_UK], dim=1) / self.config.temperature
            total_U = total_U + scores_UK.logsumexp(dim=1) - scores_UK[:, 0]
        return _mean(total_U) / 2

    @torch.no_grad()
    def _enqueue(self, content_UD: Tensor, ids_UD: Tensor, rows_U: Tensor) -> None:
        """The newest items replace the oldest."""
        size = self.config.queue_size
        newest = slice(-size, None)
        content_UD, ids_UD, rows_U = content_UD[newest], ids_UD[newest], rows_U[newest]
        at_U = (self.queue_end + torch.arange(len(rows_U), device=rows_U.device)) % size
        # In place of the tensors, not of their values: this step's backward still reads the old.
        self.queue_content_MD = self.queue_content_MD.index_copy(0, at_U, content_UD)
        self.queue_ids_MD = self.queue_ids_MD.index_copy(0, at_U, ids_UD)
        self.queue_rows_M = self.queue_rows_M.index_copy(0, at_U, rows_U)
        self.queue_end = self.queue_end + len(rows_U)


def _first_of_each(rows_B: Tensor) -> Tensor:
    """Place (U,) of the first sample of every item that has content."""
    distinct_U, which_B = rows_B.unique(return_inverse=True)
    places_B = torch.arange(len(rows_B), device=rows_B.device)
    first_U = torch.full_like(distinct_U, len(rows_B)).scatter_reduce(
        0, which_B, places_B.to(distinct_U.dtype), "amin"
    )
    return first_U[distinct_U != NO_ITEM]


def _mean(values_U: Tensor) -> Tensor:
    """0 of none."""
    return values_U.sum() / max(len(values_U), 1)

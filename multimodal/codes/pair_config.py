"""Configuration of the pairs of items that an alignment is trained on.

Imports pydantic and nothing heavy.
"""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from embedding.config import StrictConfig


class Swing(StrictConfig):
    """Item2Item pairs: Swing over the user-item graph.

    Two users of both items add w_u w_v / (alpha + number of items they share), w = 1 / sqrt(number
    of the user's items); `multimodal.codes.swing` has the whole formula.
    """

    alpha: PositiveFloat = 1.0
    num_neighbours: PositiveInt = 20
    """Most similar items kept of every item."""
    min_common_users: Annotated[int, Field(ge=2)] = 3
    """Users that engaged with both items, at least: fewer are no stable evidence."""
    max_items_per_user: PositiveInt = 200
    """Longer lists are sampled, reproducibly; the users are counted."""
    max_users_per_item: PositiveInt = 500
    """Longer lists are sampled, reproducibly; the items are counted."""
    seed: NonNegativeInt = 0


class User2Item(StrictConfig):
    """Pairs of a positive and the most similar of the user's earlier positives."""

    max_history: PositiveInt | None = None
    """Latest earlier positives that are looked at, no more than the history keeps (`max_length`).
    None: all that it keeps, but 50 at most."""

    @property
    def num_looked_at(self) -> int:
        """Latest earlier positives that are looked at, as far as they are there."""
        return self.max_history or 50

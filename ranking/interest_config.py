"""Configuration of what is read from histories; imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from embedding.config import StrictConfig
from ranking.classifier_config import Hidden


class Din(StrictConfig):
    """Target attention: the history summed with weights from the candidate. Cost: N events."""

    kind: Literal["din"] = "din"
    history: str
    hidden: Hidden = (64, 32)
    """Widths of the attention MLP."""
    softmax: bool = False
    """Normalise the attention weights; the paper does not."""


class Dien(StrictConfig):
    """How the interest evolved: a GRU over the history, then one gated by the candidate.

    One step after the other: for histories of tens of events whose order matters.
    """

    kind: Literal["dien"] = "dien"
    history: str
    hidden_dim: PositiveInt = 32
    """Width of both GRUs and of the interest vector."""


class Hstu(StrictConfig):
    """Blocks of pointwise self-attention over the history and the candidate. For long histories."""

    kind: Literal["hstu"] = "hstu"
    history: str
    num_layers: PositiveInt = 2
    dim: PositiveInt = 32
    """Width of the tokens and of the interest vector."""
    num_heads: PositiveInt = 2
    head_dim: PositiveInt = 16
    gap: str | None = None
    """A sequence of the history with `source: gap` on an identity table: adds a bias learned for
    each pair of gaps, beside the one for each distance in positions."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


InterestConfig = Annotated[Din | Dien | Hstu, Field(discriminator="kind")]

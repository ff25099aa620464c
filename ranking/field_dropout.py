"""Fields that are left out of some samples, so that a model learns to do without them."""

# Shapes: B samples, X columns of all fields.

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from embedding.tables import EmbeddedBatch


class FieldDropout(nn.Module):
    """In training, zeroes a field in a share of the samples, drawn anew every step.

    A row that no training has touched is close to zero, so an id that is new when the model is
    used looks like one that was left out (Volkovs et al., DropoutNet, NeurIPS 2017). That needs a
    table in which a new id finds such a row: `managed_collision`, `identity`, or `hashed` with many
    more rows than ids; in a hashed table with about as many, most new ids read the row of another.
    What is kept is not scaled up: the model is to tell known ids from unknown ones, not to average
    over them.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares`: of the samples that lose the field, by its name."""
        super().__init__()
        self.shares = dict(shares)

    def forward(self, embedded: EmbeddedBatch) -> EmbeddedBatch:
        """The same batch, with fields left out in training."""
        if not (self.training and self.shares):
            return embedded
        fields_BX = embedded.fields_BD
        draws = fields_BX.new_empty(len(fields_BX), len(self.shares)).uniform_()
        kept_BX = torch.ones_like(fields_BX)
        kept = replace(embedded, fields_BD=kept_BX)
        for column, (name, share) in enumerate(self.shares.items()):
            kept.field(name)[:] = draws[:, column : column + 1] >= share
        return replace(embedded, fields_BD=fields_BX * kept_BX)

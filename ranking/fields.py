"""The fields of a batch as classifier and generator read them: two views of one lookup.

rows of the tables        [E of f0 | E' of f0 | E of f1 | E' of f1 ...]
classifier, interests      E of f0 | E of f1 ...                            any dims
generator                  E' of f0, E' of f1 ...                           (B, F, D)
"""

# Shapes: B samples, F fields, D the common dim, G fields of one dim, X any width, N events.

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from embedding.feature_schema import FeatureSchema
from embedding.tables import EmbeddedBatch
from ranking.compatibility import check_model
from ranking.config import ModelConfig
from ranking.fgcnn import FeatureGenerator


class FieldViews(nn.Module):
    """Splits what widened tables give (see `ranking.compatibility.table_widths`).

    Histories read the classifier's columns only, so the generator's get no gradient from them.
    """

    order_X: Tensor | None

    def __init__(self, schema: FeatureSchema, dim: int) -> None:
        """`schema` is not widened; `dim` is the width of the generator's columns."""
        super().__init__()
        self.dim = dim
        self.dims = tuple(schema.table(f.table).embedding_dim for f in schema.sparse)
        self.sequence_dims = {s.name: schema.table(s.table).embedding_dim for s in schema.sequences}
        self.block = math.gcd(dim, *self.dims)
        order = None if len(set(self.dims)) == 1 else torch.tensor(self._block_order())
        self.register_buffer("order_X", order, persistent=False)

    def forward(self, embedded: EmbeddedBatch) -> tuple[EmbeddedBatch, Tensor]:
        """The classifier's columns of everything, and the generator's (B, F, D)."""
        fields_BX = embedded.fields_BD
        if self.order_X is None:
            both = fields_BX.view(fields_BX.shape[0], len(self.dims), -1)
            own, generator_BFD = both.split([self.dims[0], self.dim], dim=2)
            own_BX = own.flatten(1)
        else:
            blocks = fields_BX.view(fields_BX.shape[0], -1, self.block)
            ordered_BX = blocks.index_select(1, self.order_X).flatten(1)
            own_BX, generator_BX = ordered_BX.split(
                [sum(self.dims), self.dim * len(self.dims)], dim=1
            )
            generator_BFD = generator_BX.unflatten(1, (-1, self.dim))
        sequences = {
            name: values_NX[:, : self.sequence_dims[name]]
            for name, values_NX in embedded.sequences.items()
        }
        narrow = replace(embedded, fields_BD=own_BX, field_dims=self.dims, sequences=sequences)
        return narrow, generator_BFD

    def _block_order(self) -> list[int]:
        """Blocks of `block` columns: first all of the classifier's, then all of the generator's."""
        own: list[int] = []
        generator: list[int] = []
        start = 0
        for dim in self.dims:
            middle = start + dim // self.block
            stop = middle + self.dim // self.block
            own += range(start, middle)
            generator += range(middle, stop)
            start = stop
        return own + generator


class FieldProjection(nn.Module):
    """Brings fields of several dims to one: a linear map a field, none where the dim is right."""

    order_F: Tensor

    def __init__(self, dims: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.block = math.gcd(*dims)
        groups = {d: [f for f, e in enumerate(dims) if e == d] for d in sorted(set(dims))}
        self.group_dims = tuple(groups)
        self.weights = nn.ParameterDict()
        for d, members in groups.items():
            starts = [sum(dims[:f]) // self.block for f in members]
            blocks = [start + i for start in starts for i in range(d // self.block)]
            self.register_buffer(f"blocks_{d}", torch.tensor(blocks), persistent=False)
            if d != dim:
                bound = 1 / math.sqrt(d)
                start_GXD = torch.empty(len(members), d, dim).uniform_(-bound, bound)
                self.weights[f"from_{d}"] = nn.Parameter(start_GXD)
        placed = torch.tensor([f for members in groups.values() for f in members])
        self.register_buffer("order_F", placed.argsort(), persistent=False)

    def forward(self, fields_BX: Tensor) -> Tensor:
        """(B, F * D), in the fields' order."""
        blocks = fields_BX.unflatten(1, (-1, self.block))
        groups = []
        for dim in self.group_dims:
            group = blocks.index_select(1, self.get_buffer(f"blocks_{dim}"))
            group_BGX = group.flatten(1).unflatten(1, (-1, dim))
            if dim != self.dim:
                weight_GXD = self.weights[f"from_{dim}"]
                group_BGX = torch.bmm(group_BGX.transpose(0, 1), weight_GXD).transpose(0, 1)
            groups.append(group_BGX)
        return torch.cat(groups, dim=1).index_select(1, self.order_F).flatten(1)


class FieldGenerator(nn.Module):
    """From what the tables give to the fields a classifier reads."""

    def __init__(
        self, schema: FeatureSchema, config: ModelConfig, num_content_fields: int = 0
    ) -> None:
        """Raise UserError if the schema's fields do not suit the model."""
        super().__init__()
        check_model(schema, config, num_content_fields)
        names = tuple(feature.name for feature in schema.sparse)
        dims = tuple(schema.table(feature.table).embedding_dim for feature in schema.sparse)
        self.views: FieldViews | None = None
        self.projection: FieldProjection | None = None
        self.generator: FeatureGenerator | None = None
        self.keeps_raw = config.generator is None or config.generator.raw_features
        if config.field_dim is not None and set(dims) != {config.field_dim}:
            self.projection = FieldProjection(dims, config.field_dim)
            dims = (config.field_dim,) * len(dims)
        self.dim = dims[0]
        if config.generator is not None:
            if config.generator.embeddings == "separate":
                self.views = FieldViews(schema, self.dim)
            self.generator = FeatureGenerator(config.generator, len(dims), self.dim)
            new = tuple(f"new_{i}" for i in range(self.generator.num_features))
            names = (*names, *new) if self.keeps_raw else new
            dims = (self.dim,) * len(names)
        self.output_fields = tuple(zip(names, dims, strict=True))
        """(name, dim) of every field in the output."""

    def split(self, embedded: EmbeddedBatch) -> tuple[EmbeddedBatch, Tensor | None]:
        """The classifier's columns, and the generator's (B, F, D) if it has its own."""
        return (embedded, None) if self.views is None else self.views(embedded)

    def forward(self, fields_BX: Tensor, generator_BFD: Tensor | None) -> Tensor:
        """The vectors of all fields side by side, new ones behind raw ones."""
        if self.projection is not None:
            fields_BX = self.projection(fields_BX)
        if self.generator is None:
            return fields_BX
        if generator_BFD is None:
            generator_BFD = fields_BX.unflatten(1, (-1, self.dim))
        new = self.generator(generator_BFD)
        return torch.cat([fields_BX, *new] if self.keeps_raw else new, dim=1)

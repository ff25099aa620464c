"""The embedding tables of a feature schema: TorchRec collections, and what a model reads of them.

batch.pooled    --> pooled (EBC), managed_pooled (MC-EBC) ------------------> fields_BD
batch.unpooled  --> unpooled (EC per dim), managed_unpooled (MC-EC per dim) --> sequences,
                    and, summed per sample, the sparse features on sequence tables -> fields_BD
"""

# Shapes: B samples, F sparse features (fields), D embedding dim, N jagged values.

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embedding.batch import RankingBatch
from embedding.config import ManagedCollision, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SequenceFeature, SparseFeature
from embedding.initialization import init_bound, initialize_shard
from embedding.managed_collision import collision_collection, reinitialize_rows


@dataclass(frozen=True)
class EmbeddedBatch:
    """What the tables give for one batch."""

    fields_BD: Tensor
    """One vector per sparse feature, side by side in the order of `schema.sparse`."""
    field_names: tuple[str, ...]
    field_dims: tuple[int, ...]
    sequences: dict[str, Tensor]
    """Vectors (N, D) per sequence feature; sample after sample, oldest first."""
    lengths: dict[str, Tensor]
    """Events per sample, (B,), by history; shared by all sequences of the history."""
    gap_rows: dict[str, Tensor] = field(default_factory=dict)
    """Rows (N,) of the sequences with source gap: which bucket of time an event lies in."""

    def field(self, name: str) -> Tensor:
        """The (B, D) vector of one sparse feature; a view."""
        index = self.field_names.index(name)
        start = sum(self.field_dims[:index])
        return self.fields_BD[:, start : start + self.field_dims[index]]

    def stacked(self) -> Tensor:
        """All fields as (B, F, D), a view; raises ValueError if their dims differ."""
        if len(set(self.field_dims)) != 1:
            raise ValueError(f"fields have different dims {dict(self.named_dims())}")
        return self.fields_BD.view(-1, len(self.field_dims), self.field_dims[0])

    def named_dims(self) -> tuple[tuple[str, int], ...]:
        """(name, dim) of every field in order."""
        return tuple(zip(self.field_names, self.field_dims, strict=True))


def in_tables(name: str) -> bool:
    """Whether a parameter or buffer belongs to the tables: models hold them as `tables`."""
    return "tables" in name.split(".")


class EmbeddingTables(nn.Module):
    """All tables of a schema. Build it on `meta` and let `shard` place it, or on a device to run.

    Tables that sequences read live in `EmbeddingCollection`s, which hold one dim each; the others
    in one `EmbeddingBagCollection`. Managed-collision tables have collections of their own.
    """

    def __init__(self, schema: FeatureSchema, device: torch.device) -> None:
        super().__init__()
        self.schema = schema
        plain, managed = _split_tables(schema)
        self.pooled = _bag_collection(schema, plain, device)
        self.unpooled = nn.ModuleDict(
            {f"dim{dim}": collection for dim, collection in _collections(schema, plain, device)}
        )
        self.managed_pooled = _managed_bags(schema, managed, device)
        self.managed_unpooled = nn.ModuleDict(
            {
                f"dim{dim}": _managed(collection, schema, device)
                for dim, collection in _collections(schema, managed, device)
            }
        )
        self.assembly = FieldAssembly(schema)

    def forward(self, batch: RankingBatch) -> EmbeddedBatch:
        """Look up every feature of the batch."""
        pooled: list[KeyedTensor] = []
        if self.pooled is not None:
            pooled.append(self.pooled(batch.pooled))
        if self.managed_pooled is not None:
            pooled.append(self.managed_pooled(batch.pooled)[0])
        unpooled: list[dict[str, JaggedTensor]] = [
            collection(batch.unpooled) for collection in self.unpooled.values()
        ]
        unpooled += [collection(batch.unpooled)[0] for collection in self.managed_unpooled.values()]
        return self.assembly(pooled, unpooled, batch)

    def initialize(self, seed: int) -> None:
        """Draw the start values of an unsharded module; `shard` does the same for its shards."""
        tables = {table.name: table for table in self.schema.tables}
        for name, weight in self.named_parameters():
            initialize_shard(weight, tables[name.split(".")[-2]], seed=seed)


class FieldAssembly(nn.Module):
    """Brings looked-up sums into schema order, and divides those of mean features.

    Tables only sum: a TBE that averages would average per row shard under grid sharding, and a
    table would pool all its features in one way. Holds no sharded module: a leaf for tracing.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.field_names = tuple(feature.name for feature in schema.sparse)
        self.field_dims = tuple(schema.table(f.table).embedding_dim for f in schema.sparse)
        self._means = tuple(f.name for f in schema.sparse if f.pooling == "mean")
        self._pooled_after = tuple(feature.name for feature in schema.unpooled_features)
        self._sequences = tuple(feature.name for feature in schema.sequences)
        self._gaps = tuple(f.name for f in schema.sequences if f.source == "gap")
        self._history_feature = {f.history: f.name for f in reversed(schema.sequences)}
        self._block = math.gcd(*self.field_dims) if self.field_dims else 1
        self._order: tuple[tuple[str, ...], Tensor | None] | None = None
        self._mean_blocks: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        pooled: Sequence[KeyedTensor],
        unpooled: Sequence[dict[str, JaggedTensor]],
        batch: RankingBatch,
    ) -> EmbeddedBatch:
        """Concatenate, permute only where the collections' order differs from the schema's."""
        jagged = {name: values for part in unpooled for name, values in part.items()}
        names = [name for part in pooled for name in list(part.keys())]
        parts = [part.values() for part in pooled]
        for name in self._pooled_after:
            names.append(name)
            parts.append(_sum_per_sample(jagged[name]))
        fields_BD = self._in_schema_order(tuple(names), parts)
        return EmbeddedBatch(
            fields_BD=self._divide_means(fields_BD, batch) if self._means else fields_BD,
            field_names=self.field_names,
            field_dims=self.field_dims,
            sequences={name: jagged[name].values() for name in self._sequences},
            lengths={
                history: _lengths(batch.unpooled, name)
                for history, name in self._history_feature.items()
            },
            gap_rows={name: _values(batch.unpooled, name) for name in self._gaps},
        )

    def _in_schema_order(self, names: tuple[str, ...], parts: list[Tensor]) -> Tensor:
        if not parts:
            raise UserError("the schema has no sparse feature; a ranking model needs at least one")
        fields_BD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self._order is None or self._order[0] != names:
            self._order = (names, self._block_order(names, fields_BD.device))
        order = self._order[1]
        if order is None:
            return fields_BD
        # Whole blocks of gcd(dims) columns move, which is much faster than single columns.
        return self._blocks(fields_BD).index_select(1, order).view(fields_BD.shape)

    def _divide_means(self, fields_BD: Tensor, batch: RankingBatch) -> Tensor:
        """Sums of mean features divided by their number of values; 0 where there is none."""
        lengths_BM = torch.stack(
            [
                _lengths(batch.unpooled if name in self._pooled_after else batch.pooled, name)
                for name in self._means
            ],
            dim=1,
        )
        if self._mean_blocks is None:
            self._mean_blocks = self._blocks_of_means(fields_BD.device)
        blocks, mean_of_block = self._mean_blocks
        scale_BM = lengths_BM.clamp(min=1).to(fields_BD.dtype).reciprocal()
        scale = fields_BD.new_ones(fields_BD.shape[0], fields_BD.shape[1] // self._block)
        scale.index_copy_(1, blocks, scale_BM.index_select(1, mean_of_block))
        return (self._blocks(fields_BD) * scale.unsqueeze(2)).view(fields_BD.shape)

    def _blocks(self, fields_BD: Tensor) -> Tensor:
        return fields_BD.view(fields_BD.shape[0], -1, self._block)

    def _block_order(self, names: tuple[str, ...], device: torch.device) -> Tensor | None:
        if names == self.field_names:
            return None
        ranges = self._block_ranges(names)
        return torch.tensor([i for name in self.field_names for i in ranges[name]], device=device)

    def _blocks_of_means(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ranges = self._block_ranges(self.field_names)
        blocks = [(i, m) for m, name in enumerate(self._means) for i in ranges[name]]
        both = torch.tensor(blocks, device=device)
        return both[:, 0], both[:, 1]

    def _block_ranges(self, names: tuple[str, ...]) -> dict[str, range]:
        dims = dict(zip(self.field_names, self.field_dims, strict=True))
        ranges, start = {}, 0
        for name in names:
            ranges[name] = range(start, start + dims[name] // self._block)
            start = ranges[name].stop
        return ranges


def _lengths(features: KeyedJaggedTensor, name: str) -> Tensor:
    # `features[name]` would compute offsets per key and wait for the device.
    keys = features.keys()
    return features.lengths().view(len(keys), -1)[keys.index(name)]


def _values(features: KeyedJaggedTensor, name: str) -> Tensor:
    index, offsets = features.keys().index(name), features.offset_per_key()
    return features.values()[offsets[index] : offsets[index + 1]]


def _sum_per_sample(jagged: JaggedTensor) -> Tensor:
    """(B, D); zeros for a sample without values, as in a TBE."""
    values_ND, lengths_B = jagged.values(), jagged.lengths()
    on_cpu = values_ND.device.type == "cpu"  # elsewhere the check would wait for the device
    if on_cpu and values_ND.shape[0] == lengths_B.numel() and bool((lengths_B == 1).all()):
        return values_ND
    return torch.segment_reduce(
        values_ND, "sum", lengths=lengths_B.long(), axis=0, unsafe=True, initial=0.0
    )


def _split_tables(schema: FeatureSchema) -> tuple[list[TableConfig], list[TableConfig]]:
    managed = [table for table in schema.tables if isinstance(table.ids, ManagedCollision)]
    return [table for table in schema.tables if table not in managed], managed


def _bag_collection(
    schema: FeatureSchema, tables: list[TableConfig], device: torch.device
) -> EmbeddingBagCollection | None:
    configs = []
    for table in tables:
        features = [f for f in schema.pooled_features if f.table == table.name]
        if features:
            configs.append(
                EmbeddingBagConfig(
                    name=table.name,
                    num_embeddings=table.num_embeddings,
                    embedding_dim=table.embedding_dim,
                    feature_names=[feature.name for feature in features],
                    pooling=PoolingType.SUM,
                    init_fn=reinitialize_rows(init_bound(table)),
                )
            )
    return EmbeddingBagCollection(tables=configs, device=device) if configs else None


def _collections(
    schema: FeatureSchema, tables: list[TableConfig], device: torch.device
) -> list[tuple[int, EmbeddingCollection]]:
    """One collection per embedding dim, since an `EmbeddingCollection` holds a single one."""
    configs: dict[int, list[EmbeddingConfig]] = {}
    for table in tables:
        if table.name not in schema.sequence_tables:
            continue
        features: tuple[SparseFeature | SequenceFeature, ...]
        features = (*schema.unpooled_features, *schema.sequences)
        config = EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[f.name for f in features if f.table == table.name],
            init_fn=reinitialize_rows(init_bound(table)),
        )
        configs.setdefault(table.embedding_dim, []).append(config)
    return [(dim, EmbeddingCollection(tables=c, device=device)) for dim, c in configs.items()]


def _managed_bags(
    schema: FeatureSchema, tables: list[TableConfig], device: torch.device
) -> ManagedCollisionEmbeddingBagCollection | None:
    bags = _bag_collection(schema, tables, device)
    if bags is None:
        return None
    collision = collision_collection(schema, bags.embedding_bag_configs(), device)
    return ManagedCollisionEmbeddingBagCollection(
        bags, collision, allow_in_place_embed_weight_update=True
    )


def _managed(
    collection: EmbeddingCollection, schema: FeatureSchema, device: torch.device
) -> ManagedCollisionEmbeddingCollection:
    collision = collision_collection(schema, collection.embedding_configs(), device)
    return ManagedCollisionEmbeddingCollection(
        collection, collision, allow_in_place_embed_weight_update=True
    )

"""What every table is asked for in a training step, from the schema and the measured traffic."""

from dataclasses import dataclass

from embedding.config import ManagedCollision, TableConfig
from embedding.feature_schema import FeatureSchema, SequenceFeature, SparseFeature
from embedding.planning.id_distribution import DEFAULT_EXPONENT, IdDistribution, zipf
from embedding.planning.traffic import Traffic


@dataclass(frozen=True)
class TableLoad:
    """One table and the lookups of one sample."""

    table: TableConfig
    module: str
    """The collection that holds it, below `EmbeddingTables`."""
    pooled: bool
    """Summed per sample in the lookup; else every id gives a vector."""
    ids_per_sample: tuple[float, ...]
    """Mean ids of every feature on the table."""
    ids: IdDistribution
    measured: bool = False
    """Whether `ids` is what traffic says, not Zipf's law."""

    @property
    def name(self) -> str:
        """The table's name."""
        return self.table.name

    @property
    def dim(self) -> int:
        """Columns of the table."""
        return self.table.embedding_dim

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.table.num_embeddings

    @property
    def num_features(self) -> int:
        """Features that read the table."""
        return len(self.ids_per_sample)

    @property
    def total_ids_per_sample(self) -> float:
        """Mean ids of all its features."""
        return sum(self.ids_per_sample)

    @property
    def managed(self) -> bool:
        """Under managed collision."""
        return isinstance(self.table.ids, ManagedCollision)


def table_loads(
    schema: FeatureSchema, traffic: Traffic | None = None, exponent: float = DEFAULT_EXPONENT
) -> list[TableLoad]:
    """Every table's load, in the schema's order.

    Without measured traffic, a list or a history is taken at its greatest length (one id where it
    has no limit), and rows are as popular as Zipf's law with `exponent` says.
    """
    modules = collection_names(schema)
    loads = []
    for table in schema.tables:
        features = [f for f in schema.id_features if f.table == table.name]
        measured = _measured(table, traffic)
        loads.append(
            TableLoad(
                table=table,
                module=modules[table.name],
                pooled=table.name not in schema.sequence_tables,
                ids_per_sample=tuple(_ids_per_sample(f, schema, traffic) for f in features),
                ids=zipf(table.num_embeddings, exponent) if measured is None else measured,
                measured=measured is not None,
            )
        )
    return loads


def collection_names(schema: FeatureSchema) -> dict[str, str]:
    """By table, the collection of `EmbeddingTables` that holds it."""
    names = {}
    for table in schema.tables:
        managed = "managed_" if isinstance(table.ids, ManagedCollision) else ""
        unpooled = table.name in schema.sequence_tables
        names[table.name] = (
            f"{managed}unpooled.dim{table.embedding_dim}" if unpooled else f"{managed}pooled"
        )
    return names


def _ids_per_sample(
    feature: SparseFeature | SequenceFeature, schema: FeatureSchema, traffic: Traffic | None
) -> float:
    if traffic is not None and feature.name in traffic.ids_per_sample:
        return traffic.ids_per_sample[feature.name]
    if isinstance(feature, SequenceFeature):
        return float(next(h.max_length for h in schema.histories if h.name == feature.history))
    return float(feature.max_length or 1)


def _measured(table: TableConfig, traffic: Traffic | None) -> IdDistribution | None:
    found = traffic.table(table.name) if traffic is not None else None
    if found is None or not found.bin_rows:
        return None
    return IdDistribution(found.bin_rows, found.bin_shares)

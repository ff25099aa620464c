"""A bundle in one process: rows in, probabilities out, equal to what the trainer predicts.

With int8 tables they are those of the rounded tables.
"""

# Shapes: B samples, T tasks, N jagged values.

import copy
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from deploy.bundle import (
    DENSE_FILE,
    ROWS,
    WEIGHT,
    Bundle,
    load_tensors,
    read_bundle,
)
from deploy.item_content import AddedItems, ItemContent
from embedding.batch import RankingBatch
from embedding.config import Hashed, ManagedCollision
from embedding.feature_schema import FeatureSchema
from embedding.id_map import owner_of
from embedding.int8_rows import empty_rows
from embedding.int8_tables import Int8Tables
from embedding.items import ItemSource
from embedding.precision import cpu_has_bf16
from embedding.tables import EmbeddingTables
from pipeline.content.items import content_shape, item_source
from ranking.config import RankingConfig
from ranking.model import RankingModel
from ranking.tasks import probabilities

logger = logging.getLogger(__name__)


class Predictor:
    """Scores batches with a published bundle on the CPU."""

    def __init__(self, directory: Path) -> None:
        """Load a bundle.

        Args:
            directory: of the bundle.

        Raises:
            UserError: It is no bundle, or a file is missing or damaged.
        """
        self.directory = directory
        self.bundle: Bundle = read_bundle(directory)
        recipe = self.bundle.recipe
        self.schema = recipe.features
        self.tasks = [task.name for task in recipe.ranking.tasks]
        self._id_maps = {
            table.name: IdMap(directory, table.name, self.bundle.tables[table.name].segments)
            for table in self.schema.tables
            if isinstance(table.ids, ManagedCollision)
        }
        self.content = None if recipe.content is None else ItemContent.load(directory)
        is_int8 = self.bundle.table_precision == "int8"
        # Ids are mapped before the model sees them, so managed tables are plain ones here.
        self.model = RankingModel(
            plain_schema(self.schema),
            serving_config(recipe.ranking),
            tables_device=torch.device("meta" if is_int8 else "cpu"),
            content=None if recipe.content is None else content_shape(recipe.content, self.schema),
        )
        self._load_dense(directory)
        self.tables: EmbeddingTables | Int8Tables = self.model.tables
        if is_int8:
            self.tables = self._int8_tables(directory)
        else:
            self._load_weights(directory)
        self.model.eval()

    @torch.no_grad()
    def predict(self, batch: RankingBatch) -> Tensor:
        """Probabilities (B, T) in the order of `tasks`; filling rows included.

        Args:
            batch: says which items it shows, if the model reads content (`item_source`).
        """
        content = None
        if self.content is not None:
            assert batch.content is not None
            content = self.content.of(batch.content)
        batch = self._mapped(batch)
        return probabilities(self.model.rank(self.tables(batch), batch, content))

    @property
    def item_source(self) -> ItemSource | None:
        """What a loader needs to name the items of batches; None if the model reads no content."""
        recipe = self.bundle.recipe
        if self.content is None or recipe.content is None:
            return None
        return item_source(recipe.content, self.schema, self.content.item_ids)

    def with_added(self, added: AddedItems) -> "Predictor":
        """The same model, which knows these items beside those of its bundle; this one stays.

        A loader must be given the `item_source` of the one that predicts.
        """
        assert self.content is not None
        other = copy.copy(self)
        other.content = self.content.with_added(added)
        return other

    def _mapped(self, batch: RankingBatch) -> RankingBatch:
        if not self._id_maps:
            return batch
        return replace(
            batch,
            pooled=self._mapped_ids(batch.pooled),
            unpooled=self._mapped_ids(batch.unpooled),
        )

    def _mapped_ids(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        tables = {feature.name: feature.table for feature in self.schema.id_features}
        values_N = sparse.values().clone()
        bounds = sparse.offset_per_key()
        for index, feature in enumerate(sparse.keys()):
            id_map = self._id_maps.get(tables[feature])
            if id_map is not None:
                start, stop = bounds[index], bounds[index + 1]
                values_N[start:stop] = id_map.rows_of(values_N[start:stop])
        return KeyedJaggedTensor(
            keys=sparse.keys(), values=values_N, lengths=sparse.lengths(), offsets=sparse.offsets()
        )

    def _load_dense(self, directory: Path) -> None:
        found = self.model.load_state_dict(load_tensors(directory / DENSE_FILE), strict=False)
        lacking = [name for name in found.missing_keys if not name.startswith("tables.")]
        assert not lacking, lacking
        assert not found.unexpected_keys, found.unexpected_keys

    def _load_weights(self, directory: Path) -> None:
        for name, parameter in self.model.tables.named_parameters():
            self._read_table(directory, name.split(".")[-2], WEIGHT, parameter.data)

    def _int8_tables(self, directory: Path) -> Int8Tables:
        rows = {}
        for name, table in self.bundle.tables.items():
            rows[name] = empty_rows(table.num_rows, table.embedding_dim)
            self._read_table(directory, name, ROWS, rows[name])
        return Int8Tables(rows, self.model.tables.schema)

    def _read_table(self, directory: Path, name: str, part: str, target: Tensor) -> None:
        """Fill a table; besides it, one block is in memory."""
        row = 0
        for file in self.bundle.tables[name].files:
            block = load_tensors(directory / file)[part]
            target[row : row + len(block)] = block
            row += len(block)
        assert row == len(target), (name, row, len(target))


class IdMap:
    """The id map of one managed-collision table, as training left it."""

    def __init__(self, directory: Path, table: str, segments: tuple[tuple[int, int], ...]) -> None:
        stored = load_tensors(directory / f"ids/{table}.safetensors")
        self.ids = stored["ids"]
        self.rows = stored["rows"]
        self.unknown_rows = torch.tensor([stop - 1 for _, stop in segments])

    def rows_of(self, ids_N: Tensor) -> Tensor:
        """Row of every id; unknown ones share the last row of the shard that would own them."""
        unknown_N = self.unknown_rows[owner_of(ids_N, len(self.unknown_rows))]
        if not len(self.ids):
            return unknown_N
        index_N = torch.searchsorted(self.ids, ids_N).clamp_(max=len(self.ids) - 1)
        return torch.where(self.ids[index_N] == ids_N, self.rows[index_N], unknown_N)


def serving_config(trained: RankingConfig) -> RankingConfig:
    """The model on this CPU: what it computes is trained, how it computes is this machine's.

    Emulated bf16 products are hundreds of times slower than fp32 ones, which are no less exact; and
    `torch.compile` needs a compiler, and minutes for the first batch.
    """
    model, trainer = trained.model, trained.trainer
    if trainer.precision == "bf16" and not cpu_has_bf16():
        logger.warning(
            "this CPU has no bf16 instructions: the model, trained in bf16, runs in fp32"
        )
        trainer = trainer.model_copy(update={"precision": "fp32"})
    model = model.model_copy(update={"compile": False})
    return trained.model_copy(update={"model": model, "trainer": trainer})


def plain_schema(schema: FeatureSchema) -> FeatureSchema:
    """The schema with managed-collision tables as plain ones of the same size."""
    tables = tuple(
        table.model_copy(update={"ids": Hashed()})
        if isinstance(table.ids, ManagedCollision)
        else table
        for table in schema.tables
    )
    return schema.model_copy(update={"tables": tables})

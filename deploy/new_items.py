"""Vectors for the items of a catalogue file that a bundle does not know.

The file has the form of items.parquet: `item_id`, and the columns that the bundle's towers read.
Memory holds all ids, one batch of texts and images, and the new vectors.
"""

# Shapes: N new items, M modalities, D content dim.

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deploy.bundle import check_files
from deploy.encoder_files import ENCODER, HEAD_FILE
from deploy.item_content import AddedItems, ItemContent
from deploy.item_encoder import ItemEncoder
from deploy.predictor import Predictor
from embedding.errors import UserError
from embedding.items import NO_CONTENT, ItemIndex
from embedding.raw_ids import is_id_type, to_raw_ids
from multimodal.content_config import ContentConfig
from multimodal.token_range import TokenRangeError
from pipeline.content.tasks import AS_WRITTEN, Catalogue, type_fault
from pipeline.samples.contract import BoolArray, open_parquet


@dataclass(frozen=True)
class NewItems:
    """What came of a catalogue file."""

    num_listed: int
    """Items of the file."""
    items: AddedItems
    """Those that the bundle does not know, in the order of the file."""
    num_encoded: int
    """The others were known from an earlier state of the file, with the same content."""
    faults: dict[str, dict[str, int]]
    """Encoded items without a usable text or image: by modality and cause."""

    def __str__(self) -> str:
        """One line to read."""
        causes = [
            f"{modality} {cause}: {count}"
            for modality, counts in self.faults.items()
            for cause, count in counts.items()
        ]
        number = len(self.items.item_ids_N)
        encoded = "" if self.num_encoded == number else f"{self.num_encoded} of them "
        told = f"{number} of {self.num_listed} items are new and {encoded}were encoded"
        return f"{told} ({', '.join(causes)})" if causes else told


def encode_new_items(
    predictor: Predictor, path: Path, progress: Callable[[int, int], None]
) -> NewItems:
    """Encode the items of a catalogue that the bundle does not know, for `Predictor.with_added`.

    Those that training knew keep its vector, whatever text and image the file has. Those that the
    predictor has from an earlier state of the file keep theirs as long as text and image are the
    same.

    Args:
        predictor: of a bundle with content.
        path: the catalogue file; it may be replaced meanwhile.
        progress: called with new items that are done and in all.

    Raises:
        UserError: the bundle has no encoder, or the file cannot be used.
    """
    content, config = predictor.content, predictor.bundle.recipe.content
    if content is None or config is None:
        raise UserError("the model of this bundle reads no content of items; leave out --items")
    require_encoder(predictor)
    if not path.is_file():
        raise UserError(
            f"--items {path} is no file; give a Parquet file with item_id and the columns "
            f"{[tower.column for tower in config.towers.values()]}, like items.parquet of the data"
        )
    columns = {name: tower.column for name, tower in config.towers.items()}
    catalogue = Catalogue(path.parent, columns, path.name)
    size = config.tokens.items_per_batch
    with open_parquet(path) as file:  # once: all that is read is of one state
        _check_schema(file.schema_arrow, path, config)
        ids = _read_ids(file, path)
        is_new = ItemIndex(content.bank_ids_R).rows_of(ids) == NO_CONTENT
        found = _Found(predictor, content, config, catalogue, ids[is_new])
        unknown = map(found.reuse, _new_rows(file, catalogue, is_new.numpy(), size))
        for batch in _batches(unknown, size):
            found.encode(batch)
            progress(found.num_done, len(found.item_ids_N))
    return found.result(len(ids))


def require_encoder(predictor: Predictor) -> None:
    """Refuse a bundle that cannot encode items.

    Raises:
        UserError: it was published without its encoder.
    """
    if HEAD_FILE not in predictor.bundle.files:
        raise UserError(
            f"bundle {predictor.directory} was published without its content encoder, so it cannot "
            "encode --items; delete that publish directory and run `braid run` of its date again"
        )


class _Found:
    """The new items of a file, as far as they have vectors."""

    def __init__(
        self,
        predictor: Predictor,
        content: ItemContent,
        config: ContentConfig,
        catalogue: Catalogue,
        item_ids_N: Tensor,
    ) -> None:
        self._predictor, self._config, self._catalogue = predictor, config, catalogue
        self._before = content.added
        self._encoder: ItemEncoder | None = None
        self.item_ids_N = item_ids_N
        self._index = ItemIndex(item_ids_N)
        num_items = len(item_ids_N)
        self._is_done_N = torch.zeros(num_items, dtype=torch.bool)
        self._digests_NM = torch.zeros(num_items, len(config.towers), dtype=torch.int64)
        self._vectors_ND = content.bank_RD.new_zeros(num_items, content.bank_RD.shape[1])
        self._num_encoded = 0
        self._faults = {name: Counter[str]() for name in config.towers}

    @property
    def num_done(self) -> int:
        """Items that have their vector."""
        return int(self._is_done_N.sum())

    def reuse(self, rows: pa.Table) -> pa.Table:
        """Take over what was encoded before; the rows of the other new items."""
        places = self._index.rows_of(_ids_of(rows))
        rows, places = rows.filter(pa.array((places >= 0).numpy())), places[places >= 0]
        if not len(rows):
            return rows
        digests = self._catalogue.digests(rows)
        self._digests_NM[places] = torch.from_numpy(np.stack(list(digests.values()), axis=1))
        if self._before is None:
            return rows
        is_known, vectors = self._before.reusable(_ids_of(rows), self._digests_NM[places])
        self._put(places[is_known], vectors)
        return rows.filter(pa.array((~is_known).numpy()))

    def encode(self, batch: pa.Table) -> None:
        """Encode some new items."""
        encoder = self._loaded_encoder()
        columns = self._catalogue.columns.items()
        try:
            encoded = encoder({name: batch[column].to_pylist() for name, column in columns})
        except TokenRangeError as error:
            raise error.of_item(batch[AS_WRITTEN][error.row].as_py()) from error
        self._put(self._index.rows_of(_ids_of(batch)), encoded.vectors_ND)
        for name, causes in encoded.faults.items():
            self._faults[name].update(cause for cause in causes if cause is not None)
        self._num_encoded += len(batch)

    def result(self, num_listed: int) -> NewItems:
        """All of them.

        Raises:
            UserError: some were not found again.
        """
        if not self._is_done_N.all():
            raise UserError(
                f"--items {self._catalogue.path} was changed while it was read; write it under "
                "another name, and rename it when it is complete"
            )
        return NewItems(
            num_listed,
            AddedItems(self.item_ids_N, self._digests_NM, self._vectors_ND),
            self._num_encoded,
            {name: dict(sorted(counts.items())) for name, counts in self._faults.items()},
        )

    def _put(self, places: Tensor, vectors: Tensor) -> None:
        self._vectors_ND[places] = vectors
        self._is_done_N[places] = True

    def _loaded_encoder(self) -> ItemEncoder:
        if self._encoder is None:
            predictor = self._predictor
            # The folder may hold another bundle by now, whose encoder suits other weights.
            files = predictor.bundle.files.items()
            own = {name: sha for name, sha in files if name.startswith(f"{ENCODER}/")}
            check_files(predictor.directory, own)
            root = self._catalogue.root
            self._encoder = ItemEncoder(predictor.directory, self._config, root)
        return self._encoder


def _ids_of(rows: pa.Table) -> Tensor:
    return torch.tensor(rows["item_id"].to_numpy())


def _check_schema(schema: pa.Schema, path: Path, config: ContentConfig) -> None:
    wanted = {"item_id": "ids", **{t.column: name for name, t in config.towers.items()}}
    for column, what in wanted.items():
        if schema.names.count(column) != 1:
            raise UserError(
                f"--items {path} must have one column {column!r} ({what} of the items) and has "
                f"{schema.names}; name the columns as in the items.parquet of training"
            )
    if not is_id_type(schema.field("item_id").type):
        raise UserError(
            f"--items {path}: column 'item_id' has type {schema.field('item_id').type} but must be "
            "an integer or a string; cast it where the file is written"
        )
    for tower in config.towers.values():
        fault = type_fault(schema.field(tower.column).type, tower)
        if fault is not None:
            raise UserError(
                f"--items {path}: column {tower.column!r} {fault}; cast it where the file is "
                "written"
            )


def _read_ids(file: pq.ParquetFile, path: Path) -> Tensor:
    try:
        column = file.read(columns=["item_id"], use_threads=False)["item_id"]
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"--items {path} is damaged ({str(error).splitlines()[0]}); write it again"
        ) from error
    if column.null_count:
        raise UserError(
            f"--items {path}: item_id is null in {column.null_count} rows; give them an id or drop "
            "them"
        )
    ids = torch.tensor(to_raw_ids(column).to_numpy())
    distinct, counts = ids.unique(return_counts=True)
    if len(distinct) < len(ids):
        row = int((ids == distinct[counts > 1][0]).nonzero()[0])
        raise UserError(
            f"--items {path}: item_id {column[row].as_py()!r} has more than one row "
            f"({len(ids) - len(distinct)} rows too many in all); keep one row an item"
        )
    return ids


def _batches(pieces: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The rows of all pieces, `size` at a time; the last batch may be smaller."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for rows in pieces:
        waiting.append(rows)
        num_waiting += len(rows)
        if num_waiting >= size:
            together = pa.concat_tables(waiting)
            yield together[:size]
            waiting, num_waiting = [together[size:]], num_waiting - size
    if num_waiting:
        yield pa.concat_tables(waiting)


def _new_rows(
    file: pq.ParquetFile, catalogue: Catalogue, is_new: BoolArray, size: int
) -> Iterator[pa.Table]:
    """Pieces of at most `size` rows of the row groups that hold new items."""
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if is_new[start:stop].any():
            yield from catalogue.pieces(file, group, list(catalogue.columns.values()), size)
        start = stop

"""Vectors for the items of a catalogue file that a bundle does not know.

The file has the form of items.parquet: `item_id`, and the columns that the bundle's towers read.
Memory holds all ids, one batch of texts and images, and the new vectors.
"""

# Shapes: N new items, D content dim.

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deploy.encoder_files import HEAD_FILE
from deploy.item_encoder import ItemEncoder
from deploy.predictor import Predictor
from embedding.errors import UserError
from embedding.items import NO_CONTENT, ItemIndex
from embedding.raw_ids import is_id_type, to_raw_ids
from multimodal.content_config import ContentConfig
from multimodal.token_range import TokenRangeError
from pipeline.content.tasks import Catalogue, type_fault
from pipeline.samples.contract import open_parquet, read_columns


@dataclass(frozen=True)
class NewItems:
    """What came of a catalogue file."""

    num_listed: int
    """Items of the file."""
    item_ids_N: Tensor
    """Raw ids of those that the bundle does not know."""
    vectors_ND: Tensor
    faults: dict[str, dict[str, int]]
    """New items without a usable text or image: by modality and cause."""

    def __str__(self) -> str:
        """One line to read."""
        causes = [
            f"{modality} {cause}: {count}"
            for modality, counts in self.faults.items()
            for cause, count in counts.items()
        ]
        told = f"{len(self.item_ids_N)} of {self.num_listed} items are new and were encoded"
        return f"{told} ({', '.join(causes)})" if causes else told


def add_new_items(
    predictor: Predictor, path: Path, progress: Callable[[int, int], None]
) -> NewItems:
    """Encode the items of a catalogue that the predictor does not know, and make it know them.

    Those that it knows keep the vector of training, whatever text and image the file has.

    Args:
        predictor: of a bundle with content.
        path: the catalogue file.
        progress: called with new items encoded and in all.

    Raises:
        UserError: the bundle has no encoder, or the file cannot be used.
    """
    content, config = predictor.content, predictor.bundle.recipe.content
    if content is None or config is None:
        raise UserError("the model of this bundle reads no content of items; leave out --items")
    if HEAD_FILE not in predictor.bundle.files:
        raise UserError(
            f"bundle {predictor.directory} was published without its content encoder, so it cannot "
            "encode --items; delete that publish directory and run `braid run` of its date again"
        )
    _check_file(path, config)
    ids = _read_ids(path)
    known = ItemIndex(content.item_ids_R)
    is_new = (known.rows_of(ids) == NO_CONTENT).numpy()
    total = int(is_new.sum())
    faults = {name: Counter[str]() for name in config.towers}
    found_ids, found_vectors = [ids[:0]], [content.vectors_RD[:0]]
    done = 0
    if total:
        encoder = ItemEncoder(predictor.directory, config, path.parent)
        for batch in _batches(path, config, is_new):
            values = {
                name: batch[tower.column].to_pylist() for name, tower in config.towers.items()
            }
            try:
                encoded = encoder(values)
            except TokenRangeError as error:
                raise error.of_item(int(batch["item_id"][error.row].as_py())) from error
            found_ids.append(torch.tensor(batch["item_id"].to_numpy()))
            found_vectors.append(encoded.vectors_ND)
            for name, causes in encoded.faults.items():
                faults[name].update(cause for cause in causes if cause is not None)
            done += len(batch)
            progress(done, total)
    new = NewItems(
        len(ids),
        torch.cat(found_ids),
        torch.cat(found_vectors),
        {name: dict(sorted(counts.items())) for name, counts in faults.items()},
    )
    content.add(new.item_ids_N, new.vectors_ND)
    return new


def _check_file(path: Path, config: ContentConfig) -> None:
    if not path.is_file():
        raise UserError(
            f"--items {path} is no file; give a Parquet file with item_id and the columns "
            f"{[tower.column for tower in config.towers.values()]}, like items.parquet of the data"
        )
    with open_parquet(path) as file:
        schema: pa.Schema = file.schema_arrow
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


def _read_ids(path: Path) -> Tensor:
    column = read_columns(path, ["item_id"])["item_id"]
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


def _batches(path: Path, config: ContentConfig, is_new: np.ndarray) -> Iterator[pa.Table]:
    """The new rows, `content.tokens.items_per_batch` at a time; the last batch may be smaller."""
    size = config.tokens.items_per_batch
    waiting: list[pa.Table] = []
    num_waiting = 0
    for rows in _new_rows(path, config, is_new):
        waiting.append(rows)
        num_waiting += len(rows)
        if num_waiting >= size:
            together = pa.concat_tables(waiting)
            yield together[:size]
            waiting, num_waiting = [together[size:]], num_waiting - size
    if num_waiting:
        yield pa.concat_tables(waiting)


def _new_rows(path: Path, config: ContentConfig, is_new: np.ndarray) -> Iterator[pa.Table]:
    """New rows in pieces of at most a batch; row groups without any are not read."""
    columns = {name: tower.column for name, tower in config.towers.items()}
    catalogue = Catalogue(path.parent, columns, path.name)
    metadata = pq.read_metadata(path)
    start = 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if is_new[start:stop].any():
            at = start
            for piece in catalogue.batches(
                group, list(columns.values()), config.tokens.items_per_batch
            ):
                yield piece.filter(pa.array(is_new[at : at + len(piece)]))
                at += len(piece)
        start = stop

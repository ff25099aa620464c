"""A bundle: what scoring needs of a trained model, as safetensors and JSON, without pickle.

bundle.json                                recipe, tables, and the SHA-256 of every file
dense.safetensors                          every parameter and buffer that is not a table's
tables/<table>-<first row>.safetensors     a block of rows a file: `weight` in fp32, or `rows` in
                                           int8 (embedding.int8_rows)
ids/<table>.safetensors                    managed collision only: sorted `ids`, their `rows`
content.safetensors                        where the model reads content: `item_ids`, `vectors`
encoder/                                   and what encodes further items (deploy.encoder_files)
codes.parquet                              where it reads codes of items: those of its run
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedding.checkpoint_files import read_manifest
from embedding.config import ManagedCollision, StrictConfig, TablePrecision
from embedding.errors import UserError
from embedding.files import file_sha256, link_or_copy
from embedding.hashing import NO_ID
from embedding.int8_rows import quantized_rows
from embedding.stored import (
    read_companion,
    read_companion_rows,
    read_dense,
    read_id_map,
    read_tables,
)
from multimodal.content_head import trained_vectors
from pipeline.codes.features import CODES_FILE
from pipeline.config import Recipe
from pipeline.samples.columns import ColumnKind
from ranking.averaging import published_weights

BUNDLE_FILE = "bundle.json"
DENSE_FILE = "dense.safetensors"
CONTENT_FILE = "content.safetensors"
MODEL_PREFIX = "model."
WEIGHT, ROWS = "weight", "rows"
"""The tensor in a file of a table in fp32, and in int8."""


class BundledTable(StrictConfig):
    """One table of a bundle."""

    num_rows: int
    embedding_dim: int
    files: tuple[str, ...]
    """Blocks of rows, in order."""
    segments: tuple[tuple[int, int], ...] = ()
    """Managed collision only: row ranges of the shards; the last row of each is for unknown ids."""


class Bundle(StrictConfig):
    """The contents of `bundle.json`; version 1."""

    schema_version: Literal[1] = 1
    recipe: Recipe
    tables: dict[str, BundledTable]
    table_precision: TablePrecision = "fp32"
    """Of the rows of all tables."""
    files: dict[str, str]
    """SHA-256 by path relative to the bundle."""
    codebooks: str | None = None
    """Codebooks that its code tables belong to; None without codes."""
    event_columns: dict[str, ColumnKind] = {}
    """What the id columns of the event log held: a request must hold the same."""


class Origin(StrictConfig):
    """What a bundle must know of the samples that its model was trained on."""

    event_columns: dict[str, ColumnKind] = {}
    codebooks: str | None = None
    codes: Path | None = None
    """File with the codes of items, where the model reads them."""


def write_bundle(
    recipe: Recipe,
    checkpoint: Path,
    directory: Path,
    origin: Origin = Origin(),  # noqa: B008 # frozen
) -> Bundle:
    """Write the bundle of one checkpoint.

    Of tables, memory holds one block of rows; of content, what the bank holds of all items.

    Args:
        recipe: what the checkpoint was trained with, and how tables are to be held.
        checkpoint: one step's directory.
        directory: an empty or missing directory.
        origin: of the samples it was trained on.

    Raises:
        UserError: int8 tables were asked for, and a table holds a value that is not finite; or the
            files of a tower are not those of the training.
    """
    for folder in ("tables", "ids"):
        (directory / folder).mkdir(parents=True)
    dense = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in published_weights(read_dense(checkpoint)).items()
        if name.startswith(MODEL_PREFIX)
    }
    save_file(dense, directory / DENSE_FILE)
    if recipe.content is not None:
        # Transformers: seconds, for content only.
        from deploy.encoder_files import require_trained_models, write_encoder

        models = read_companion(checkpoint, "bank/models").get("")
        require_trained_models(recipe.content, models)
        save_file(_content(checkpoint), directory / CONTENT_FILE)
        write_encoder(recipe.content, read_companion(checkpoint, "encoder/"), directory)
    if origin.codes is not None:
        link_or_copy(origin.codes, directory / CODES_FILE)
    tables = {
        name: _write_table(recipe, checkpoint, name, blocks, directory)
        for name, blocks in read_tables(checkpoint)
    }
    bundle = Bundle(
        recipe=recipe,
        tables=tables,
        table_precision=recipe.publish.tables,
        files={
            str(path.relative_to(directory)): file_sha256(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
        codebooks=origin.codebooks,
        event_columns=origin.event_columns,
    )
    (directory / BUNDLE_FILE).write_text(bundle.model_dump_json(indent=2))
    return bundle


def describe(directory: Path) -> Bundle:
    """The description of a bundle; its files are not looked at.

    Raises:
        UserError: It is no bundle.
    """
    path = directory / BUNDLE_FILE
    if not path.is_file():
        raise UserError(
            f"--bundle {directory} holds no {BUNDLE_FILE}; published bundles are listed by "
            "`braid models list --out DIR`"
        )
    try:
        return Bundle.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"{path} is not a bundle description of this version; publish the model again"
        ) from error


def read_bundle(directory: Path) -> Bundle:
    """The description of a bundle whose files have been checked.

    Raises:
        UserError: It is no bundle, or a file is missing or damaged.
    """
    bundle = describe(directory)
    check_files(directory, bundle.files)
    return bundle


def check_files(directory: Path, files: Mapping[str, str]) -> None:
    """Compare files of a bundle with their checksums.

    Raises:
        UserError: one is missing or damaged.
    """
    for name, checksum in files.items():
        file = directory / name
        if not file.is_file() or file_sha256(file) != checksum:
            raise UserError(
                f"bundle file {file} is missing or damaged (its SHA-256 is not the published one); "
                "copy the bundle again or publish it again"
            )


def identity_of(directory: Path) -> str:
    """Changes with whatever a bundle holds: its description has the checksums of its files.

    Raises:
        UserError: It is no bundle.
    """
    describe(directory)
    return file_sha256(directory / BUNDLE_FILE)[:16]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"bundle file {path} cannot be read: {error}; copy it again") from error


def _write_table(
    recipe: Recipe,
    checkpoint: Path,
    name: str,
    blocks: Iterator[tuple[int, Tensor]],
    directory: Path,
) -> BundledTable:
    files = []
    for start, block in blocks:
        file = f"tables/{name}-{start:010d}.safetensors"
        save_file(_stored(recipe.publish.tables, name, start, block), directory / file)
        files.append(file)
    table = recipe.features.table(name)
    segments: tuple[tuple[int, int], ...] = ()
    if isinstance(table.ids, ManagedCollision):
        segments = tuple(read_manifest(checkpoint).segments(name))
        save_file(_id_map(checkpoint, name), directory / f"ids/{name}.safetensors")
    saved = read_manifest(checkpoint).tables[name]
    return BundledTable(
        num_rows=saved.num_rows,
        embedding_dim=saved.num_columns,
        files=tuple(files),
        segments=segments,
    )


def _stored(precision: TablePrecision, table: str, start: int, block: Tensor) -> dict[str, Tensor]:
    match precision:
        case "fp32":
            return {WEIGHT: block.contiguous()}
        case "int8":
            bad_R = ~block.isfinite().all(dim=1)
            if bad_R.any():
                raise UserError(
                    f"table {table!r}: row {start + int(bad_R.nonzero()[0])} holds a value that is "
                    "not finite, and 8 bits would hide it; train anew with a lower learning rate, "
                    "or publish with publish.tables=fp32"
                )
            return {ROWS: quantized_rows(block)}


def _id_map(checkpoint: Path, name: str) -> dict[str, Tensor]:
    ids = read_id_map(checkpoint, name)
    rows = (ids != NO_ID).nonzero().squeeze(1)
    order = ids[rows].argsort()
    return {"ids": ids[rows][order].contiguous(), "rows": rows[order].to(torch.int64).contiguous()}


def _content(checkpoint: Path) -> dict[str, Tensor]:
    """Vectors of all items: only further ones need the towers."""
    (state,) = read_companion(checkpoint, "step").values()
    assert state[1], f"the content bank of {checkpoint} is older than its weights"
    (item_ids_R,) = read_companion(checkpoint, "bank/item_ids").values()
    blocks = (block for _, block in read_companion_rows(checkpoint, "bank/fused"))
    vectors_RD = trained_vectors(read_companion(checkpoint, "encoder/"), blocks)
    return {"item_ids": item_ids_R, "vectors": vectors_RD}

"""The data contract of items.parquet and users.parquet, as checks.

items.parquet   item_id, categorical columns (integer, string or a list of them), dense columns,
                text (string), image (a JPEG, PNG, WEBP, GIF, BMP or TIFF file: its bytes, or a path
                relative to the data root without `..`; may be null)
users.parquet   optional: user_id, categorical and dense columns
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from embedding.config import FeatureSchema, StrictConfig
from embedding.errors import UserError
from embedding.raw_ids import Int64Array, is_id_type, to_raw_ids
from multimodal.images import DAMAGED, FAULTS, FORMATS, OUTSIDE, image_path
from pipeline.columns import SourceColumns, source_columns
from pipeline.contract import (
    CatalogueIds,
    check_feature_types,
    check_present,
    open_parquet,
    read_columns,
)

MAX_IMAGE_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: a small file can claim to be huge."""


class ImageFacts(StrictConfig):
    """What `check_images` found."""

    num_items: int
    num_missing: int
    """Null images: allowed, the model has a missing-modality mask."""
    unreadable: dict[str, str]
    """By item id: why its image cannot be used; later stages treat it as missing."""


def check_catalogue(root: Path, features: FeatureSchema) -> CatalogueIds:
    """Check items.parquet and users.parquet against what the recipe reads.

    Returns:
        The sorted raw ids of items and, if there is a users.parquet, of users.

    Raises:
        UserError: a file or column is missing, has a wrong type, a null or repeated id, or a NaN.
    """
    items = _check_entities(root / "items.parquet", "item_id", source_columns(features, "items"))
    path = root / "users.parquet"
    columns = source_columns(features, "users")
    if not path.exists():
        if columns.ids or columns.dense:
            raise UserError(
                f"{path} does not exist, but features read the user columns "
                f"{[*columns.ids, *columns.dense]}; deliver it or remove those features"
            )
        return CatalogueIds(items, None)
    return CatalogueIds(items, _check_entities(path, "user_id", columns))


def _check_entities(path: Path, key: str, columns: SourceColumns) -> Int64Array:
    with open_parquet(path) as file:
        schema = file.schema_arrow
    check_present(schema, [key, *columns.ids, *columns.dense], path)
    if not is_id_type(schema.field(key).type):
        raise UserError(
            f"{path}: column {key!r} has type {schema.field(key).type} but must be an integer or "
            "a string; cast it to int64 where the file is written"
        )
    check_feature_types(schema, columns.ids, columns.dense, path)
    table = read_columns(path, [key, *columns.dense])
    _check_dense(table, key, columns.dense, path)
    if table[key].null_count:
        row = pc.index(table[key].is_null(), True).as_py()
        raise UserError(f"{path}: {key} is null in row {row}; give the row an id or drop it")
    ids = to_raw_ids(table[key]).to_numpy()
    order = np.argsort(ids, kind="stable")
    repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(repeated):
        twice = table[key][int(order[repeated[0]])].as_py()
        raise UserError(
            f"{path}: {key} {twice!r} has more than one row ({len(repeated)} rows too many in "
            "all); keep one row an id"
        )
    return np.asarray(ids[order])


def _check_dense(table: pa.Table, key: str, dense: Sequence[str], path: Path) -> None:
    for name in dense:
        wrong = pc.invert(pc.is_finite(table[name].cast(pa.float64(), safe=False)))
        count = pc.sum(wrong).as_py() or 0
        if count:
            owner = table[key][pc.index(wrong, True).as_py()].as_py()
            raise UserError(
                f"{path}: dense column {name!r} is NaN or infinite for {key} {owner!r} (in {count} "
                "rows); write null where a value is missing"
            )


# --- images --------------------------------------------------------------------------------------


def check_images(items: pa.Table, root: Path) -> ImageFacts:
    """Read the header of every item's image.

    Args:
        items: columns `item_id` and `image` (bytes, or paths relative to `root`).
        root: the data root.

    Raises:
        UserError: the image column is neither bytes nor strings.
    """
    kind = items.schema.field("image").type
    is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_path or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(
            f"{root / 'items.parquet'}: column 'image' has type {kind} but must be bytes or a path "
            "relative to the data root; write it as binary or string"
        )
    unreadable = {}
    for item_id, image in zip(items["item_id"], items["image"], strict=True):
        if not image.is_valid:
            continue
        source = image_path(image.as_py(), root) if is_path else io.BytesIO(image.as_py())
        fault = f"{image.as_py()!r} is {OUTSIDE}" if source is None else _image_fault(source)
        if fault:
            unreadable[str(item_id.as_py())] = fault
    return ImageFacts(
        num_items=items.num_rows,
        num_missing=items["image"].null_count,
        unreadable=unreadable,
    )


def _image_fault(source: Path | io.BytesIO) -> str | None:
    try:
        with Image.open(source, formats=FORMATS) as image:  # reads the header only
            width, height = image.size
    except FileNotFoundError:
        return f"no file {source}"
    except (*FAULTS, Image.DecompressionBombError) as error:
        said = next(iter(str(error).splitlines()), DAMAGED)
        return said.replace(f"{source!r}", "it")
    if width * height > MAX_IMAGE_PIXELS:
        return f"{width} x {height} pixels are more than {MAX_IMAGE_PIXELS}"
    return None


def refuse_many_unreadable(facts: ImageFacts, max_share: float, root: Path) -> None:
    """Stop if too many images cannot be read.

    Raises:
        UserError: more than `max_share` of the items; names one of them.
    """
    count = len(facts.unreadable)
    if count > max_share * facts.num_items:
        item_id, fault = next(iter(facts.unreadable.items()))
        raise UserError(
            f"{root / 'items.parquet'}: the images of {count} of {facts.num_items} items cannot be "
            f"read, more than data.max_quarantined_share={max_share} allows; for item_id {item_id}:"
            f" {fault}; repair them, write null, or raise the limit"
        )


def has_images(root: Path) -> bool:
    """True if the catalogue has an image column."""
    return "image" in pq.read_schema(root / "items.parquet").names

"""All faults of delivered data at once, for `braid data check`.

Reads the schema of every file, the keys and dense columns of items.parquet and users.parquet, and
the first rows of some event files of every day; ingest checks all rows, and stops at the first
faulty file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from embedding.errors import UserError
from embedding.feature_schema import Source
from embedding.raw_ids import Int64Array
from multimodal.codes.config import ColumnVectors
from pipeline.config import Recipe
from pipeline.day_warnings import missing_days
from pipeline.days import PARTITION, available_days, day_files, parse_day, stray_partitions
from pipeline.samples.catalogue import catalogue_kinds, check_entities, entity_faults
from pipeline.samples.column_kinds import compared_kinds
from pipeline.samples.columns import EventColumns, SourceColumns, source_columns
from pipeline.samples.contract import (
    CatalogueIds,
    EventFile,
    empty_day_fault,
    event_file,
    event_schema_faults,
    first_rows,
    normalise_events,
    open_parquet,
    presence_faults,
    row_faults,
)

ROWS_PER_DAY = 10_000
"""Whose values are looked at, of all files of a day together."""
FILES_PER_DAY = 16
"""Whose first rows they are: a file's columns are read whole for them."""
_EVENT_FILE = re.compile(rf"{PARTITION}\d{{4}}-\d{{2}}-\d{{2}}/[^ :]+")


@dataclass
class Delivery:
    """What was looked at, and what was found."""

    days: list[str] = field(default_factory=list)
    """Of the event log; those that were looked into."""
    num_files: int = 0
    num_rows: int = 0
    """Events whose values were looked at."""
    faults: list[str] = field(default_factory=list)
    """Each must be mended before a run."""
    warnings: list[str] = field(default_factory=list)
    """What a run goes on with."""


def check_delivery(recipe: Recipe, day: str | None = None) -> Delivery:
    """Look at the data of a recipe's root.

    Args:
        recipe: says which columns are read, and as what.
        day: the only day to look into; None: all there are.

    Raises:
        UserError: `day` is none.
    """
    if day is not None:
        parse_day(day, "--date")
    found = Delivery()
    known = _catalogue(recipe, found)
    root, marker = recipe.data.root, recipe.data.complete_marker
    try:
        delivered = available_days(root)
        complete = available_days(root, marker)
    except UserError as error:
        found.faults.append(str(error))
        return found
    strays = stray_partitions(root)
    if strays:
        found.warnings.append(f"partitions that are no days are left out: {', '.join(strays)}")
    open_days = [other for other in delivered if other not in complete]
    if open_days:
        found.warnings.append(f"days without {marker} are not there yet: {', '.join(open_days)}")
    missing = missing_days(complete)
    if missing:
        found.warnings.append(f"days between others are missing: {', '.join(missing)}")
    if day is not None and day not in delivered:
        found.faults.append(
            f"{root / 'events' / (PARTITION + day)} does not exist: the event log has "
            f"{delivered[0]} .. {delivered[-1]}; deliver it or name another day"
        )
        return found
    found.days = complete if day is None else [day]
    files = {checked: _check_files(recipe, checked, found) for checked in found.days}
    kinds = [(file.path, file.kinds) for sound in files.values() for file in sound]
    if known is None:
        found.faults += compared_kinds(kinds)[1]
        return found
    found.faults += compared_kinds([*kinds, *catalogue_kinds(root, known)])[1]
    for checked, sound in files.items():
        _check_rows(recipe, checked, [file.path for file in sound if file.num_rows], known, found)
    return found


def grouped(sentences: Iterable[str]) -> list[str]:
    """What is the same for many event files, said once: of the first, with their number."""
    groups: dict[str, list[str]] = {}
    for sentence in sentences:
        groups.setdefault(_EVENT_FILE.sub("", sentence), []).append(sentence)
    return [
        group[0] if len(group) == 1 else f"{group[0]} (so in {len(group)} files)"
        for group in groups.values()
    ]


def _catalogue(recipe: Recipe, found: Delivery) -> CatalogueIds | None:
    """Add the faults of items.parquet and users.parquet; their ids, if those can be read."""
    root = recipe.data.root
    items = _ids(recipe, "items", found)
    columns = source_columns(recipe.features, "users")
    if (root / "users.parquet").exists():
        users = _ids(recipe, "users", found)
        return None if items is None or users is None else CatalogueIds(items, users)
    if columns.ids or columns.dense:
        found.faults.append(
            f"{root / 'users.parquet'} does not exist, but features read the user columns "
            f"{[*columns.ids, *columns.dense]}; deliver it or remove those features"
        )
    return None if items is None else CatalogueIds(items, None)


def _ids(recipe: Recipe, source: Source, found: Delivery) -> Int64Array | None:
    path, key = recipe.data.root / f"{source}.parquet", f"{source.removesuffix('s')}_id"
    columns = source_columns(recipe.features, source)
    try:
        faults = list(entity_faults(path, key, columns))
        if source == "items":
            faults += _content_faults(recipe, path)
        found.num_files += 1
        found.faults += faults
        if faults:  # the ids may be sound all the same
            columns = SourceColumns(ids=(), dense=())
        return check_entities(path, key, columns)
    except UserError as error:
        if str(error) not in found.faults:
            found.faults.append(str(error))
        return None


def _content_faults(recipe: Recipe, path: Path) -> Iterator[str]:
    """Columns that towers and codes read."""
    names = []
    if recipe.codes is not None and recipe.codes.taken_from is None:
        vectors = recipe.codes.vectors
        if isinstance(vectors, ColumnVectors):
            names.append(vectors.column)
    for content in recipe.contents.values():
        names += [tower.column for tower in content.towers.values()]
    with open_parquet(path) as file:
        yield from presence_faults(file.schema_arrow, list(dict.fromkeys(names)), path)


def _check_files(recipe: Recipe, day: str, found: Delivery) -> list[EventFile]:
    """The files of a day whose schemas are sound."""
    root, columns = recipe.data.root, EventColumns.of(recipe)
    sound, num_rows, all_read = [], 0, True
    paths = day_files(root, [day])
    for path in paths:
        found.num_files += 1
        try:
            with open_parquet(path) as file:
                num_rows += file.metadata.num_rows
                faults = list(event_schema_faults(file.schema_arrow, columns, path))
                found.faults += faults
                if not faults:
                    sound.append(event_file(file, path, day, columns))
        except UserError as error:
            all_read = False
            found.faults.append(str(error))
    if all_read and not num_rows:
        found.faults.append(empty_day_fault(root, day, len(paths)))
    return sound


def _check_rows(
    recipe: Recipe, day: str, paths: Sequence[Path], known: CatalogueIds, found: Delivery
) -> None:
    """Rows that ingest would put aside; faults where they are more than the recipe allows."""
    columns, limit = EventColumns.of(recipe), recipe.data.max_quarantined_share
    num_rows = num_bad = 0
    sentences = []
    paths = paths[:: ceil(len(paths) / FILES_PER_DAY)] if paths else ()
    for path in paths:
        try:
            table = first_rows(path, columns.required, ceil(ROWS_PER_DAY / len(paths)))
            events = normalise_events(table, columns, path)
        except UserError as error:
            found.faults.append(str(error))
            continue
        reason, names = row_faults(table, events, columns, day, known)
        counts = Counter(names[i] for i in reason[reason >= 0].tolist())
        num_rows, num_bad = num_rows + table.num_rows, num_bad + counts.total()
        sentences += [
            f"{path}: {count} of the first {table.num_rows} rows: {name}, first in row "
            f"{int((reason == names.index(name)).argmax())}"
            for name, count in counts.most_common()
        ]
    found.num_rows += num_rows
    if num_bad > limit * num_rows:
        found.faults += [f"{s} (data.max_quarantined_share={limit})" for s in sentences]
    else:
        found.warnings += sentences

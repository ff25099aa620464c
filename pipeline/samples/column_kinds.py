"""How the event log writes its ids, which whoever asks about the same items must know."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from embedding.errors import UserError
from embedding.raw_ids import is_id_list_type
from pipeline.samples.columns import ColumnKind, EventColumns


def column_kinds(schema: pa.Schema, columns: EventColumns) -> dict[str, ColumnKind]:
    """What the id columns of a sound event file hold, lists of logged histories included."""
    lists = (name for history in columns.logged.values() for name in history.columns.values())
    names = dict.fromkeys(("user_id", "item_id", *columns.ids, *lists))
    kinds = {
        name: column_kind(schema.field(name).type)
        for name in names
        if not pa.types.is_timestamp(_value_type(schema.field(name).type))
    }
    # A label that a history carries may be of any numbers, or of nulls: its ids are 0 and 1.
    return kinds | {name: ColumnKind(values="integer") for name in columns.labels if name in kinds}


def column_kind(kind: pa.DataType) -> ColumnKind:
    """What a column of this type holds, which the data contract allows for ids."""
    values = _value_type(kind)
    values = values.value_type if pa.types.is_dictionary(values) else values
    is_list = is_id_list_type(kind)
    if pa.types.is_null(values):
        return ColumnKind(values="any", is_list=is_list)
    is_integer = pa.types.is_integer(values) or pa.types.is_boolean(values)
    return ColumnKind(values="integer" if is_integer else "string", is_list=is_list)


def merged_kinds(
    sources: Iterable[tuple[Path | str, Mapping[str, ColumnKind]]],
) -> dict[str, ColumnKind]:
    """What the id columns of all sources hold; nulls tell nothing.

    Args:
        sources: files, or what else holds such columns in words, with the kinds of its columns.

    Raises:
        UserError: integers in one and strings in another: one item would have two ids.
    """
    kinds, faults = compared_kinds(sources)
    for fault in faults:
        raise UserError(fault)
    return kinds


def compared_kinds(
    sources: Iterable[tuple[Path | str, Mapping[str, ColumnKind]]],
) -> tuple[dict[str, ColumnKind], list[str]]:
    """What `merged_kinds` gives, and a sentence on each column that is not written alike."""
    found: dict[str, tuple[ColumnKind, Path | str]] = {}
    faults: dict[str, str] = {}
    for place, kinds in sources:
        for name, kind in kinds.items():
            known, first = found.get(name, (kind, place))
            if "any" not in (known.values, kind.values) and known.values != kind.values:
                faults.setdefault(
                    name,
                    f"column {name!r} holds {known.values}s in {first} and {kind.values}s in "
                    f"{place}, which are never equal ids; write it alike in all files of all days "
                    "(a CSV reader takes codes of digits for numbers unless it is told the type)",
                )
            is_list = known.is_list or kind.is_list
            values = kind.values if known.values == "any" else known.values
            first = place if known.values == "any" else first
            found[name] = (ColumnKind(values=values, is_list=is_list), first)
    return {name: kind for name, (kind, _) in found.items()}, list(faults.values())


def _value_type(kind: pa.DataType) -> pa.DataType:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if nested or pa.types.is_fixed_size_list(kind) else kind

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
    return {
        name: _column_kind(schema.field(name).type)
        for name in names
        if not pa.types.is_timestamp(_value_type(schema.field(name).type))
    }


def merged_kinds(files: Iterable[tuple[Path, Mapping[str, ColumnKind]]]) -> dict[str, ColumnKind]:
    """What the id columns of all files hold; nulls tell nothing.

    Raises:
        UserError: integers in one file and strings in another: one item would have two ids.
    """
    found: dict[str, tuple[ColumnKind, Path]] = {}
    for path, kinds in files:
        for name, kind in kinds.items():
            known, first = found.get(name, (kind, path))
            if "any" not in (known.values, kind.values) and known.values != kind.values:
                raise UserError(
                    f"column {name!r} holds {known.values}s in {first} and {kind.values}s in "
                    f"{path}, which are never equal ids; write it alike in all files"
                )
            is_list = known.is_list or kind.is_list
            values = kind.values if known.values == "any" else known.values
            source = path if known.values == "any" else first
            found[name] = (ColumnKind(values=values, is_list=is_list), source)
    return {name: kind for name, (kind, _) in found.items()}


def _column_kind(kind: pa.DataType) -> ColumnKind:
    values = _value_type(kind)
    values = values.value_type if pa.types.is_dictionary(values) else values
    is_list = is_id_list_type(kind)
    if pa.types.is_null(values):
        return ColumnKind(values="any", is_list=is_list)
    is_string = pa.types.is_string(values) or pa.types.is_large_string(values)
    # Fractions and decimals are labels that a history carries: ids 0 and 1.
    return ColumnKind(values="string" if is_string else "integer", is_list=is_list)


def _value_type(kind: pa.DataType) -> pa.DataType:
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if nested or pa.types.is_fixed_size_list(kind) else kind

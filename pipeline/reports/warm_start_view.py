"""What a warm start took over and what starts anew, as a person reads it."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 6
"""Names in a line; the report has all of them."""


def warm_start_line(facts: Mapping[str, Any], parent: str) -> str:
    """One line from a `WarmStartReport`: how much came from the run of `parent`."""
    redrawn = list(facts["initialised"])
    line = f"warm start from {parent}: carried {len(facts['carried'])}, "
    weights_only = facts.get("weights_only", ())
    if weights_only:
        line += f"of {len(weights_only)} tables weights only, for the optimizer is another one, "
    from_average = facts.get("from_average", ())
    if from_average:
        line += f"of {len(from_average)} dense ones the published average, for none is kept now, "
    line += f"redrawn {len(redrawn)}"
    if redrawn:
        more = len(redrawn) - _SHOWN
        names = ", ".join(redrawn[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        line += f" ({names})"
    tables = facts.get("rows", {})
    if not tables:
        return line
    carried, sourced, new = (
        sum(rows[kind] for rows in tables.values()) for kind in ("carried", "sourced", "redrawn")
    )
    return (
        f"{line}; rows of {len(tables)} code tables: {carried} go on, {sourced} start from the "
        f"most similar row, {new} anew"
    )


def redrawn_rows(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """What starts anew and why, for the report; and managed ids that found no room."""
    rows = [{"name": name, "why": why} for name, why in facts["initialised"].items()]
    rows += [
        {"name": table, "why": "weights go on; another sparse optimizer has no use for the state"}
        for table in facts.get("weights_only", ())
    ]
    dropped = {table: number for table, number in facts["dropped_ids"].items() if number}
    return rows + [
        {"name": f"tables/{table}", "why": f"{number} ids of the earlier run found no room"}
        for table, number in dropped.items()
    ]

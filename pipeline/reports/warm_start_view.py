"""What a warm start took over and what starts anew, as a person reads it."""

from embedding.warm_start_report import WarmStartReport

_SHOWN = 6
"""Names in a line; the report has all of them."""


def warm_start_line(report: WarmStartReport, parent: str) -> str:
    """One line: how much came from the run of `parent`."""
    redrawn = list(report.initialised)
    line = f"warm start from {parent}: carried {len(report.carried)}, "
    if report.weights_only:
        num_tables = len(report.weights_only)
        line += f"of {num_tables} tables weights only, for the optimizer is another one, "
    if report.from_average:
        number = len(report.from_average)
        line += f"of {number} dense ones the published average, for none is kept now, "
    line += f"redrawn {len(redrawn)}"
    if redrawn:
        more = len(redrawn) - _SHOWN
        names = ", ".join(redrawn[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        line += f" ({names})"
    tables = report.rows.values()
    if not tables:
        return line
    carried, sourced = sum(rows.carried for rows in tables), sum(rows.sourced for rows in tables)
    return (
        f"{line}; rows of {len(tables)} code tables: {carried} go on, {sourced} start from the "
        f"most similar row, {sum(rows.redrawn for rows in tables)} anew"
    )


def redrawn_rows(report: WarmStartReport) -> list[dict[str, str]]:
    """What starts anew and why, for the report; and managed ids that found no room."""
    rows = [{"name": name, "why": why} for name, why in report.initialised.items()]
    rows += [
        {"name": table, "why": "weights go on; another sparse optimizer has no use for the state"}
        for table in report.weights_only
    ]
    dropped = {table: number for table, number in report.dropped_ids.items() if number}
    return rows + [
        {"name": f"tables/{table}", "why": f"{number} ids of the earlier run found no room"}
        for table, number in dropped.items()
    ]

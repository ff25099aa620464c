"""Statistics of the ids a recipe's features really carry; `braid traffic` measures them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema

MIN_GROWTH_DAYS = 14
"""Over fewer days, rows that come back after a while look like rows that are new."""


class TableTraffic(StrictConfig):
    """Lookups of one table."""

    table: str
    num_rows: PositiveInt
    lookups: NonNegativeInt
    rows_touched: NonNegativeInt
    """Distinct rows that were looked up at least once."""
    rows_seen_once: NonNegativeInt
    highest_row: NonNegativeInt | None = None
    """None under managed collision, which gives ids their rows in training, in files that do not
    say it, and without lookups."""
    bin_rows: tuple[float, ...]
    """Rows of every popularity bin, hottest first."""
    bin_shares: tuple[float, ...]
    """Share of the lookups that go to every bin."""
    new_rows_per_day: NonNegativeFloat | None = None
    """Rows touched on the last day and never before; None with less than `MIN_GROWTH_DAYS` days."""


class Traffic(StrictConfig):
    """What the samples of some days say; version 1."""

    schema_version: Literal[1] = 1
    rows: NonNegativeInt
    """Samples read."""
    days: PositiveInt = 1
    """That they are of."""
    rows_per_day: NonNegativeFloat
    ids_per_sample: dict[str, float] = Field(default_factory=dict)
    """By feature; missing ids count, as they are looked up too."""
    tables: tuple[TableTraffic, ...] = ()

    def table(self, name: str) -> TableTraffic | None:
        """Statistics of one table, if it was measured."""
        return next((table for table in self.tables if table.table == name), None)


def read_traffic(path: Path, schema: FeatureSchema) -> Traffic:
    """A file that `braid traffic --json` wrote, of the tables of `schema`, or some of them.

    Raises:
        UserError: It is missing or something else, of other tables, or of a table's earlier rows.
    """
    if not path.is_file():
        raise UserError(f"traffic file {path} does not exist; write it with `braid traffic --json`")
    try:
        traffic = Traffic.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"{path} is no traffic file of this version ({error.error_count()} faults, first: "
            f"{error.errors()[0]['msg']}); write it again with `braid traffic --json`"
        ) from error
    _check_tables(traffic, schema, path)
    return traffic


def _check_tables(traffic: Traffic, schema: FeatureSchema, path: Path) -> None:
    again = "measure it again with `braid traffic --json`"
    found = [(table, traffic.table(table.name)) for table in schema.tables]
    if all(measured is None for _, measured in found):
        raise UserError(
            f"traffic file {path} is of the tables {[t.table for t in traffic.tables]}, and none "
            f"of the recipe's is among them ({[table.name for table, _ in found]}); {again}"
        )
    for table, measured in found:
        if measured is not None and measured.num_rows != table.num_embeddings:
            raise UserError(
                f"traffic file {path}: table {table.name!r} had {measured.num_rows} rows when it "
                f"was measured and has {table.num_embeddings} now, which gives ids other rows; "
                f"{again}"
            )

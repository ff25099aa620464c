"""What the user has agreed to for one execution of a command; no recipe holds it."""

from dataclasses import dataclass
from typing import Annotated

import typer

ShorterHistoriesOption = Annotated[
    bool,
    typer.Option(
        "--shorter-histories",
        help="Let histories begin later than they do where earlier days are gone from the log.",
    ),
]
RefreshCatalogueOption = Annotated[
    bool,
    typer.Option(
        "--refresh-catalogue",
        help="Make what was made with other items.parquet and users.parquet, or other files that "
        "they name, again with today's.",
    ),
]


@dataclass(frozen=True)
class Consent:
    """Options of `braid run`, `stage` and `backfill` that are meant for this one time."""

    shorter_histories: bool = False
    """Ingest may begin later than it did, although the days before are gone from the log."""
    refresh_catalogue: bool = False
    """Published artifacts are made again where they were made with another catalogue."""

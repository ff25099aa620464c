"""What the user has agreed to for one execution of a command; no recipe holds it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Consent:
    """Options of `braid run`, `stage` and `backfill` that are meant for this one time."""

    shorter_histories: bool = False
    """Ingest may begin later than it did, although the days before are gone from the log."""

"""Spans of days that an output directory has ingested, and which of them a run needs.

A span's artifact lies in DIR/<its last day>/ingest. It chains on the latest earlier one and
continues its user state, so a run of a later day ingests only the days that came since.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import config_hash, read_manifest
from pipeline.days import Span

INGEST = "ingest"


class Spans:
    """Reads what is there whenever it is asked: stages that run meanwhile change the answers."""

    def __init__(self, out: Path, days: Sequence[str], config: dict[str, Any]) -> None:
        """The spans below one output directory.

        Args:
            out: output directory.
            days: of the event log, ascending.
            config: what ingest depends on; artifacts of other settings are not chained on.
        """
        self.out = out
        self.days = days
        self._hash = config_hash(config)

    def span(self, last: str) -> Span:
        """Days of the span that ends at `last`; a published one goes on with what it went on with.

        Else a file that came late to an old day would chain it on a span that is stale itself.
        """
        recorded = read_manifest(self.out / last / INGEST)
        if recorded is not None and recorded.config_hash == self._hash:
            day = recorded.facts["previous"]
            if day is None or self._chains(day, last):
                return self._after(day, last)
        earlier = (p.parts[-3] for p in self.out.glob(f"????-??-??/{INGEST}/manifest.json"))
        return self._after(max((d for d in earlier if self._chains(d, last)), default=None), last)

    def back_to(self, last: str, first: str) -> list[Span]:
        """The spans that hold the days `first` .. `last`, oldest first."""
        spans = [self.span(last)]
        while spans[0].days[0] > first and spans[0].previous is not None:
            spans.insert(0, self.span(spans[0].previous))
        return spans

    def chain(self, last: str) -> list[str]:
        """Last days of the spans whose user state the one of `last` continues, oldest first.

        A file that came late to an old day makes that span, and so the ones after it, stale.
        """
        chain = [last]
        while (previous := self.span(chain[0]).previous) is not None:
            chain.insert(0, previous)
        return chain

    def _chains(self, day: str, last: str) -> bool:
        manifest = read_manifest(self.out / day / INGEST)
        return day < last and manifest is not None and manifest.config_hash == self._hash

    def _after(self, previous: str | None, last: str) -> Span:
        return Span(
            tuple(d for d in self.days if d <= last and (previous is None or d > previous)),
            previous,
        )

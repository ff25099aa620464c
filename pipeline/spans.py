"""Spans of days that an output directory has ingested, and which of them a run needs.

A span's artifact lies in DIR/<its last day>/ingest. It chains on the latest earlier one and
continues its user state, so a run of a later day ingests only the days that came since.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from embedding.errors import UserError
from pipeline.artifacts import MANIFEST, Manifest, config_hash, read_manifest
from pipeline.consent import Consent
from pipeline.days import PARTITION, Span, named, run_command
from pipeline.event_files import DayFiles, KnownDays
from pipeline.samples.ingest_facts import IngestFacts

INGEST = "ingest"
logger = logging.getLogger(__name__)


def first_day_held(days: Sequence[str], previous: Path | None) -> str:
    """First day whose events are in the histories and counts of a span.

    Args:
        days: of the span.
        previous: the ingest artifact that the span continues.
    """
    manifest = None if previous is None else read_manifest(previous, IngestFacts)
    return days[0] if manifest is None else manifest.facts.first_day


class Spans:
    """Reads what is there whenever it is asked: stages that run meanwhile change the answers."""

    def __init__(
        self,
        out: Path,
        root: Path,
        days: Sequence[str],
        config: dict[str, Any],
        consent: Consent = Consent(),  # noqa: B008 # frozen
        say: Callable[[str], None] = logger.info,
    ) -> None:
        """The spans below one output directory.

        Args:
            out: output directory.
            root: data root with the event log.
            days: of the event log, ascending.
            config: what ingest depends on; artifacts of other settings are not chained on.
            consent: whether a span may begin later than one that is there.
            say: shows a line before many event files are read.
        """
        self.out = out
        self.root = root
        self.days = days
        self.known_days = KnownDays(out, root, say)
        self._hash = config_hash(config)
        self._consent = consent

    def span(self, last: str) -> Span:
        """Days of the span that ends at `last`; a published one goes on with what it went on with.

        Else a file that came late to an old day would chain it on a span that is stale itself. What
        cannot be made again stays: once the artifact before is pruned, a late file would have the
        whole log ingested, or no run come about at all.

        Raises:
            UserError: its days are gone, or a new span would lack days that an artifact holds.
        """
        recorded = self._manifest(last)
        if recorded is not None and self._stays(recorded):
            return Span(recorded.facts.days, recorded.facts.previous)
        if recorded is not None:
            return self._after(recorded.facts.previous, last)
        earlier = (p.parts[-3] for p in self.out.glob(f"????-??-??/{INGEST}/manifest.json"))
        known = (day for day in earlier if day < last and self._manifest(day) is not None)
        span = self._after(max(known, default=None), last)
        if not self._consent.shorter_histories:
            self._require_whole(span)
        return span

    def inputs(self, span: Span, catalogue: str) -> dict[str, str]:
        """What the artifact of a span is made of.

        The catalogue grows every day, and what ingest takes from it are the ids that are known: a
        published span stays as it is, and join reads the columns of today. Of a span that is not
        there `events` are left out: they take long to tell, and nobody but its ingest needs them.

        Args:
            span: one of `span`.
            catalogue: today's fingerprint of the files of items and users.
        """
        recorded = self._manifest(span.days[-1])
        if recorded is not None and self._stays(recorded):
            return recorded.inputs
        inputs = {} if recorded is None else self.events(span)
        if span.previous is not None:
            before = self._manifest(span.previous)
            assert before is not None, span
            inputs["previous"] = before.artifact_id
        if recorded is not None and inputs.items() <= recorded.inputs.items():
            return recorded.inputs
        return {**inputs, "catalogue": catalogue}

    def events(self, span: Span) -> dict[str, str]:
        """The input that tells the event files of a span; reads those that are not known."""
        recorded = self._manifest(span.days[-1])
        known = {} if recorded is None else recorded.facts.day_files
        changed = span.days if recorded is None else self._changed(span.days, recorded)
        if recorded is not None and not changed:
            return {"events": recorded.inputs["events"]}
        contents = {
            day: (self.known_days.files(day) if day in changed else known[day]).content
            for day in span.days
        }
        return {"events": config_hash(contents)}

    def back_to(self, last: str, first: str) -> list[Span]:
        """The spans that hold the days `first` .. `last`, oldest first.

        Raises:
            UserError: one of them came too late to enter a span.
        """
        spans = [self.span(last)]
        while spans[0].days[0] > first and spans[0].previous is not None:
            spans.insert(0, self.span(spans[0].previous))
        held = {day for span in spans for day in span.days}
        late = [day for day in self.days if first <= day <= last and day not in held]
        if late:
            after = next(span.days[-1] for span in spans if span.days[-1] > late[0])
            again = "the same command again" if after == last else run_command(self.out, after)
            raise UserError(
                f"{self.root / 'events'} has {late[0]}, which came after {self.out} had ingested "
                "later days, and what these were made of is pruned or deleted, so histories cannot "
                f"take it in; {self._made_again(after, again)}, or move {PARTITION}{late[0]} away"
            )
        return spans

    def chain(self, last: str, first: str) -> list[str]:
        """Last days of the spans that hold the days `first` .. `last`, and of those before them.

        Oldest first. A file that came late to an old day makes that span, and so the ones after it,
        stale; the chain ends where an old artifact was removed.
        """
        spans = self.back_to(last, first)
        while (day := spans[0].previous) is not None and self._manifest(day) is not None:
            spans.insert(0, self.span(day))
        return [span.days[-1] for span in spans]

    def files_of(self, spans: Sequence[Span], days: Sequence[str]) -> dict[str, DayFiles]:
        """The event files of some days of published spans, as ingest found them."""
        held: dict[str, DayFiles] = {}
        for span in spans:
            recorded = self._manifest(span.days[-1])
            assert recorded is not None
            held |= recorded.facts.day_files
        return {day: held[day] for day in days}

    def cascade(self, span: Span) -> list[str]:
        """A sentence on what is ingested anew, if files of a published span have changed."""
        recorded, last = self._manifest(span.days[-1]), span.days[-1]
        if recorded is None or self._stays(recorded):
            return []
        changed = self._changed(span.days, recorded)
        if not changed:
            return []
        published = (p.parts[-3] for p in self.out.glob(f"????-??-??/{INGEST}/{MANIFEST}"))
        later = sorted(day for day in published if day > last and self._manifest(day) is not None)
        what = f"the span {span.days[0]} .. {last}" if len(span.days) > 1 else "it"
        spans = "span" if len(later) == 1 else f"{len(later)} spans"
        and_so = f", and so {'is' if len(later) == 1 else 'are'} the {spans} after it"
        after = f"{and_so}, up to {later[-1]}" if later else ""
        return [
            f"event files of {named(changed)} changed since they were ingested: {what} is "
            f"ingested anew{after}"
        ]

    def kept(self, last: str) -> dict[str, list[str]]:
        """Sentences on spans up to `last` that stay although their event files changed.

        Returns:
            By sentence the days whose files no run takes in before somebody does what it says.
        """
        said = {}
        for day in self.chain(last, last):
            recorded = self._manifest(day)
            obstacle = None if recorded is None else self._obstacle(recorded)
            if recorded is None or obstacle is None:
                continue
            there = [d for d in self.days if (recorded.facts.previous or "") < d <= day]
            changed = self._changed(there, recorded)
            if changed:
                sentence = (
                    f"event files of {named(changed)} are not those that {self.out / day / INGEST} "
                    f"was made of, which stays as it is, because {obstacle}; to take them in, "
                    f"{self._made_again(day, run_command(self.out, day))}"
                )
                said[sentence] = changed
        return said

    def _made_again(self, day: str, again: str) -> str:
        """How to have a span made again that stays as it is.

        Once its artifact is deleted, the chain of a later day ends after it: only a command that
        needs a day of the span itself makes it again.
        """
        recorded = self._manifest(day)
        assert recorded is not None
        return (
            f"delete {self.out / day / INGEST} and, with all days since {recorded.facts.first_day} "
            f"in {self.root / 'events'}, run {again}"
        )

    def _stays(self, recorded: Manifest[IngestFacts]) -> bool:
        return self._obstacle(recorded) is not None

    def _obstacle(self, recorded: Manifest[IngestFacts]) -> str | None:
        """Why a published span cannot be made again from what it was made of; None: it can."""
        past = sorted(set(recorded.facts.days) - set(self.days))
        if past:
            return f"the event log no longer has {named(past)}"
        previous = recorded.facts.previous
        if previous is None or self._manifest(previous) is not None:
            return None
        before = self.out / previous / INGEST
        is_there = read_manifest(before) is not None
        what = "was made again with other settings" if is_there else "is pruned or deleted"
        return f"{before}, which it goes on with, {what}"

    def _after(self, previous: str | None, last: str) -> Span:
        days = tuple(d for d in self.days if d <= last and (previous is None or d > previous))
        if not days:
            raise UserError(
                f"{self.out / last / INGEST} is gone, and so are the days of the event log that it "
                "held; restore either of them, or train on fewer days (window.train_days)"
            )
        return Span(days, previous)

    def _require_whole(self, span: Span) -> None:
        """Refuse a new span that lacks days which an artifact of any settings holds.

        Raises:
            UserError: the event log no longer has them, and histories and counts would.
        """
        held: set[str] = set()
        for path in self.out.glob(f"????-??-??/{INGEST}/{MANIFEST}"):
            manifest = read_manifest(path.parent, IngestFacts)
            assert manifest is not None
            # The artifacts of earlier days may be gone: each says how far back its own events go.
            held.update(manifest.facts.days, [manifest.facts.first_day])
            held.update(filter(None, [manifest.facts.previous]))
        last, start = span.days[-1], span.previous or ""
        lost = sorted(day for day in held - set(self.days) if start < day < last)
        if lost:
            raise UserError(
                f"{self.out / last / INGEST} would be made anew from {span.days[0]} on, because "
                "what ingest depends on has changed (event columns, histories, tasks, "
                "data.user_buckets), or it is gone with those before it; but histories and counts "
                f"there go back to {lost[0]}, and {self.root / 'events'} no longer has all days "
                "since then. Restore these days; or return to the settings before; or choose "
                "another --out; or, to go on without those events, add --shorter-histories"
            )

    def _changed(self, days: Sequence[str], recorded: Manifest[IngestFacts]) -> list[str]:
        """Days whose files are not those that an artifact was made of."""
        known = recorded.facts.day_files
        return [day for day in days if day not in known or not self.known_days.are(day, known[day])]

    def _manifest(self, day: str) -> Manifest[IngestFacts] | None:
        """Of the span that ends at a day, if it was made with the same settings."""
        manifest = read_manifest(self.out / day / INGEST, IngestFacts)
        return None if manifest is None or manifest.config_hash != self._hash else manifest

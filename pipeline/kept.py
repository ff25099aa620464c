"""What of an output directory stays when it is pruned.

It is what the next run or a rollback needs, and what makes the latest runs no-ops when they are
run again:

    OUT/<date>              of the latest runs, by date and by when they were made; of what is in
                            production or a rollback returns to, of what the next run starts from;
                            of those that these went on with; of the latest that were published
                            and never promoted
    OUT/<date>/*            `RECORDS` of every run
    OUT/<day>/ingest, join  of the days that the latest runs trained on, and of all later ones; of
                            those since the model that the next run starts from
    OUT/models/<id>         in production, the promotions before it, and what gates compare with
    OUT/codebooks, OUT/content_tokens
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from embedding.errors import UserError
from pipeline.artifacts import MANIFEST, Manifest, UnreadFacts, read_manifest
from pipeline.codes.align_facts import AlignFacts
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.config import Recipe
from pipeline.days import available_days
from pipeline.gate_decision import GateDecision
from pipeline.lineage import next_parent
from pipeline.promotions import Promotion, Promotions
from pipeline.pruned import PRUNED
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import promotions, spoiled_by
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.train_facts import TrainFacts

SPANS = ("ingest", "join")
RECORDS = (RECIPE_FILE, "summary.json", "report.html", PRUNED)
"""What a run leaves besides its artifacts: little, and the only record of how a model has done."""


def run_dates(out: Path) -> list[str]:
    """Dates that were run and of which more than their records is there, ascending."""
    return sorted(
        path.parent.name
        for path in out.glob(f"????-??-??/{RECIPE_FILE}")
        if any(entry.name not in (*SPANS, *RECORDS) for entry in path.parent.iterdir())
    )


class Kept:
    """What must stay."""

    def __init__(self, out: Path, dates: list[str], keep: int) -> None:
        """Look it up.

        Args:
            out: output directory.
            dates: of its runs, ascending.
            keep: how many runs and promotions stay.

        Raises:
            UserError: the recipe of the latest run cannot be read.
        """
        self.out = out
        self.recipe: Recipe = read_recipe(out / dates[-1])
        newest = frozenset(dates[-keep:])
        self.latest = newest | set(sorted(dates, key=self._made_at)[-keep:])
        """Runs that are no-ops when they are run again."""
        past = promotions(out)
        returns = list(islice(_returns(past), max(keep, 2)))
        untried = [date for date in dates if self._was_never_promoted(date, past)]
        # Newest first and no more than needed: each may read the manifests of all its ancestors.
        usable = (date for date in reversed(untried) if spoiled_by(out, date) is None)
        self.tried = tuple(sorted(islice(usable, keep)))
        """Runs whose bundle was never promoted, and may be yet: it lies nowhere else."""
        self.no_longer_tried = frozenset(untried) - set(self.tried)
        start = next_parent(out)
        going_on = self.latest | ({start} if start else set())
        self.dates = (
            going_on
            | {day for date in going_on for day in self._goes_on_with(date)}
            | {change.date for change in returns[:2]}
            | set(self.tried)
        )
        """Whose run stays, its samples aside."""
        self._first_day = self._first_day_of_samples(newest, start)
        older = (date for date in self.latest - newest if date < self._first_day)
        self._backfilled = [self._days_of(date) for date in older]
        compared = ([c for c in past.in_force if c.date < date][-1:] for date in self.latest)
        entries = (
            *(*returns, *past.in_force[-max(keep, 2) :]),
            *(change for found in compared for change in found),
        )
        published = (self._manifest(date, "publish") for date in self.dates)
        self.models = {change.artifact_id for change in entries} | {
            # The same files as those of a run that stays.
            manifest.artifact_id
            for manifest in published
            if manifest is not None
        }
        """Artifact ids of the promoted bundles that stay."""

    def needs_samples(self, day: str) -> bool:
        """Whether what the span that ends at a day holds may be read again."""
        if day >= self._first_day:
            return True
        ingested = read_manifest(self.out / day / "ingest", IngestFacts)
        days = {day} if ingested is None else set(ingested.facts.days)
        return any(days & needed for needed in self._backfilled)

    def _made_at(self, date: str) -> tuple[str, str]:
        """When the latest of its own stages was published."""
        stages = (path for path in (self.out / date).glob("*") if path.name not in SPANS)
        found = (read_manifest(path) for path in stages)
        return max((m.created_at for m in found if m is not None), default=""), date

    def _days_of(self, date: str) -> set[str]:
        """Days that a run has trained on, or may, and that it is evaluated on."""
        days, (codes, window) = self._days(), (self.recipe.codes, self.recipe.window)
        trained = self._training(date)
        if trained is None or (codes is not None and codes.has_alignment):
            first = self._window_start(date)
        else:
            first = trained.days[0]
        later = [day for day in days if day > date][: window.eval_days]
        return {date, *(day for day in days if first <= day <= date), *later}

    def _was_never_promoted(self, date: str, past: Promotions) -> bool:
        bundle = self._manifest(date, "publish")
        gate = read_manifest(self.out / date / "gate", GateDecision)
        if bundle is None or past.ever_promoted(bundle.artifact_id):
            return False
        return gate is None or gate.facts.passed

    def _goes_on_with(self, date: str) -> Iterator[str]:
        """Dates without which a run of this date would not find its stages current."""
        trained = self._training(date)
        if trained is not None and trained.parent is not None:
            yield trained.parent
        coded = read_manifest(self.out / date / "quantize", QuantizeFacts)
        if coded is not None and coded.facts.previous is not None:
            yield coded.facts.previous
        aligned = read_manifest(self.out / date / "align", AlignFacts)
        if aligned is not None and aligned.facts.previous is not None:
            yield aligned.facts.previous

    def _first_day_of_samples(self, latest: frozenset[str], start: str | None) -> str:
        """First day that the next run, or one of the latest run again, may train on."""
        codes = self.recipe.codes
        if start is None or (codes is not None and codes.has_alignment):
            return self._window_start(min(latest))
        starts_from = self._training(start)
        assert starts_from is not None
        trained = (self._training(date) for date in latest)
        # The span of the last day that the start has trained on is what later ones continue.
        firsts = [facts.days[0] for facts in trained if facts is not None]
        return min([starts_from.days[-1], *firsts])

    def _window_start(self, date: str) -> str:
        train_days = self.recipe.window.train_days
        if train_days is None:
            return ""  # all days there are
        known = [day for day in self._days() if day <= date]
        return known[-train_days:][0] if known else ""

    def _days(self) -> list[str]:
        """Days of the event log and of all spans."""
        days = set()
        for path in self.out.glob(f"????-??-??/ingest/{MANIFEST}"):
            manifest = read_manifest(path.parent, IngestFacts)
            assert manifest is not None
            days |= set(manifest.facts.days)
        with suppress(UserError):  # spans outlive the events they were made of
            days |= set(available_days(self.recipe.data.root))
        return sorted(days)

    def _training(self, date: str) -> TrainFacts | None:
        manifest = read_manifest(self.out / date / "train", TrainFacts)
        return None if manifest is None else manifest.facts

    def _manifest(self, date: str, stage: str) -> Manifest[UnreadFacts] | None:
        return read_manifest(self.out / date / stage)


def _returns(past: Promotions) -> Iterator[Promotion]:
    """What is in production, and what one rollback after the other returns to."""
    while past.in_force:
        yield past.in_force[-1]
        past = past.taken_back("")

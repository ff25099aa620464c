"""What a replica serves now, and how it comes to serve something newer without a pause.

The newer model is loaded aside, while the older one answers, and takes its place in one assignment:
a batch is scored by one model, whole. One that cannot be loaded leaves the older one in place.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pyarrow as pa
from pydantic import model_validator

from deploy.bundle import Bundle, describe, identity_of
from deploy.predictor import Predictor
from deploy.serving.scorer import Scorer, feature_sources, item_codes, kept_sources
from deploy.serving.wire import ServedModel, ServiceState
from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.days import catalogue_files, fingerprint
from pipeline.registry import require_production
from pipeline.samples.join_rows import FeatureSources

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 600.0
"""Between two tries to load the same."""
NOT_ON_DISK = ""
"""Fingerprint of a catalogue that is in memory alone; equal to that of no file."""
REFUSED = (UserError, OSError, pa.ArrowException)
"""What is raised of a catalogue that cannot be used."""

logger = logging.getLogger(__name__)


class ModelSource(StrictConfig):
    """Where a service finds its model and catalogue."""

    out: Path | None = None
    """Output directory of runs, whose model in production is served."""
    bundle: Path | None = None
    """Or one bundle, and what takes its place in that folder."""
    data: Path | None = None
    """Directory of items.parquet and users.parquet; None: where training read them."""
    encode_new_items: bool = True
    """Give items that the bundle does not know a content vector, where the model reads them."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.out is None) == (self.bundle is None):
            raise ValueError(
                "name either an output directory (out), whose model in production is served, or "
                "one bundle"
            )
        return self

    def current(self) -> ServedModel:
        """What is to be served now.

        Raises:
            UserError: no model is in production.
        """
        if self.bundle is not None:
            identity = identity_of(self.bundle)
            return ServedModel(date=None, artifact_id=identity, bundle=str(self.bundle))
        assert self.out is not None
        model = require_production(self.out)
        return ServedModel(
            date=model.date, artifact_id=model.manifest.artifact_id, bundle=str(model.bundle)
        )

    def root_of(self, bundle: Bundle) -> Path:
        """Directory of the items.parquet and users.parquet that a bundle's model reads."""
        return self.data or bundle.recipe.data.root

    def load(self, model: ServedModel, before: "Loaded | None" = None) -> "Loaded":
        """Load a model with the catalogue as it is now, and try it.

        A catalogue that is refused keeps no model from taking the place of another: it is loaded
        with the one that is served so far.

        Args:
            model: from `current`.
            before: what is served so far; of the same model only the catalogue is read.

        Raises:
            UserError: the bundle or the catalogue cannot be used.
        """
        if before is not None and before.model == model:
            return self._with_catalogue(before)
        directory = Path(model.bundle)
        bundle = describe(directory)
        sources, catalogue = self._sources(bundle, before)  # fails before the tables
        predictor = Predictor(directory)
        sources = replace(sources, codes=item_codes(predictor.bundle, directory))
        if self._encodes(predictor) and catalogue != NOT_ON_DISK:
            try:
                predictor = self._with_new_items(predictor)
            except REFUSED as error:
                if before is None:
                    raise
                logger.warning("new items have no content, as the catalogue is refused: %s", error)
                catalogue = NOT_ON_DISK
        if self.bundle is not None and identity_of(directory) != model.artifact_id:
            raise UserError(f"{directory} was replaced while it was loaded; it is tried again")
        return Loaded.of(model, predictor, sources, catalogue)

    def _sources(self, bundle: Bundle, before: "Loaded | None") -> tuple[FeatureSources, str]:
        """The catalogue for a bundle and its fingerprint; the one before where it is refused."""
        root = self.root_of(bundle)
        # Of before it is read: rewritten meanwhile, it is read again.
        catalogue = catalogue_of(root)
        try:
            return feature_sources(bundle, root), catalogue
        except REFUSED as error:
            held = None if before is None else kept_sources(bundle, root, before.scorer.sources)
            if held is None:
                raise
            logger.warning("the catalogue before is used, as the present one is refused: %s", error)
            return held, NOT_ON_DISK

    def _with_catalogue(self, before: "Loaded") -> "Loaded":
        """The same model; nothing of its bundle but the encoder is read, which it checks itself."""
        root = self.root_of(before.predictor.bundle)
        catalogue = catalogue_of(root)
        sources = feature_sources(before.predictor.bundle, root)
        sources = replace(sources, codes=before.scorer.sources.codes)
        predictor = before.predictor
        if self._encodes(predictor):
            predictor = self._with_new_items(predictor)
        return Loaded.of(before.model, predictor, sources, catalogue)

    def _encodes(self, predictor: Predictor) -> bool:
        """Whether new items get content.

        Raises:
            UserError: they should, and the bundle has no encoder.
        """
        if not self.encode_new_items or predictor.content is None:
            return False
        from deploy.new_items import require_encoder  # transformers: seconds, for content only

        require_encoder(predictor)
        return True

    def _with_new_items(self, predictor: Predictor) -> Predictor:
        from deploy.new_items import encode_new_items

        path = self.root_of(predictor.bundle) / "items.parquet"
        new = encode_new_items(predictor, path, lambda *_: None)
        logger.info("%s: %s", path, new)
        return predictor.with_added(new.items)


@dataclass(frozen=True)
class Loaded:
    """A model that answers."""

    model: ServedModel
    predictor: Predictor
    scorer: Scorer
    catalogue: str
    """Fingerprint of its items and users; `NOT_ON_DISK`: those that lie there were refused."""
    loaded_at: str

    @classmethod
    def of(
        cls, model: ServedModel, predictor: Predictor, sources: FeatureSources, catalogue: str
    ) -> "Loaded":
        """Made ready to score.

        Raises:
            UserError: the bundle does not say what its log held, or scores nothing finite.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(model, predictor, Scorer(predictor, sources), catalogue, now)


class Tries:
    """When what could not be loaded is tried again: after pauses that double.

    Loading costs what serving needs.
    """

    def __init__(self) -> None:
        self._what: object = None
        self._at_s, self._pause_s = 0.0, FIRST_PAUSE_S

    def may(self, what: object) -> bool:
        """Whether it is time."""
        return what != self._what or time.monotonic() >= self._at_s

    def failed(self, what: object) -> None:
        """It was tried now."""
        again = what == self._what
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self._what, self._at_s = what, time.monotonic() + self._pause_s


class LiveModel:
    """The loaded model of one replica."""

    def __init__(self, source: ModelSource) -> None:
        """Load what is in production.

        Raises:
            UserError: there is none, or it cannot be used.
        """
        self.source = source
        self._now = source.load(source.current())
        self._tries = {"model": Tries(), "catalogue": Tries()}
        self._errors: dict[str, str] = {}
        self._stop = threading.Event()
        self.num_failures = 0
        """Tries to load what is new that failed."""
        self.refreshed_s = time.time()
        """When all that is new was last served, in Unix time."""

    @property
    def now(self) -> Loaded:
        """What answers; whoever scores asks once, and uses that until the batch is done."""
        return self._now

    @property
    def state(self) -> ServiceState:
        """As the service tells it."""
        loaded = self._now
        return ServiceState(
            model=loaded.model,
            tasks=loaded.scorer.tasks,
            request=loaded.scorer.form.asked,
            loaded_at=loaded.loaded_at,
            last_error="; ".join(self._errors.values()) or None,
        )

    def refresh(self) -> bool:
        """Serve what is in production, with the catalogue as it is; whether anything was new.

        Whatever keeps it from loading is logged, kept as `last_error`, and tried again later; the
        model that is served goes on, with its catalogue read anew where that is another by now.
        """
        before = self._now
        self._attempt("model", self._newer_model)
        self._attempt("catalogue", self._newer_catalogue)
        if not self._errors:
            self.refreshed_s = time.time()
        return self._now is not before

    def _newer_model(self) -> tuple[ServedModel, str] | None:
        model = self.source.current()
        if model == self._now.model:
            return None
        # A model that needs a mended catalogue is tried as soon as that is there.
        return model, catalogue_of(self.source.root_of(describe(Path(model.bundle))))

    def _newer_catalogue(self) -> tuple[ServedModel, str] | None:
        catalogue = catalogue_of(self.source.root_of(self._now.predictor.bundle))
        return None if catalogue == self._now.catalogue else (self._now.model, catalogue)

    def _attempt(self, what: str, newer: Callable[[], tuple[ServedModel, str] | None]) -> None:
        wanted, tries = None, self._tries[what]
        try:
            wanted = newer()
            if wanted is not None:
                if not tries.may(wanted):
                    return
                self._now = self.source.load(wanted[0], self._now)
                logger.info("serves %s", self._now.model)
        except Exception as error:  # noqa: BLE001 # the older one goes on, whatever it is
            tries.failed(wanted)
            self.num_failures += 1
            self._errors[what] = f"{type(error).__name__}: {error}"
            logger.error("goes on with the %s before: %s", what, self._errors[what])
        else:
            self._errors.pop(what, None)

    def watch(self, interval_s: float, told: Callable[[], None] = lambda: None) -> None:
        """Refresh in the background, until `close`; replicas do so at different times.

        Args:
            interval_s: between two looks, about.
            told: called after each.
        """

        def look() -> None:
            while not self._stop.wait(interval_s * random.uniform(0.8, 1.2)):  # noqa: S311
                self.refresh()
                told()

        threading.Thread(target=look, name="model-watch", daemon=True).start()

    def close(self) -> None:
        """End the watching; a model that is being loaded is not waited for."""
        self._stop.set()


def catalogue_of(root: Path) -> str:
    """Fingerprint of the items and users of a directory."""
    return fingerprint(catalogue_files(root))

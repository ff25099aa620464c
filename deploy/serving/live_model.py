"""What a replica serves now, and how it comes to serve something newer without a pause.

The newer model is loaded aside, while the older one answers, and takes its place in one assignment:
a batch is scored by one model, whole. One that cannot be loaded leaves the older one in place.
"""

import logging
import random
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import model_validator

from deploy.bundle import describe
from deploy.predictor import Predictor
from deploy.serving.scorer import Scorer, feature_sources
from deploy.serving.wire import ServedModel, ServiceState
from embedding.config import StrictConfig
from pipeline.days import catalogue_files, fingerprint
from pipeline.registry import require_production

FIRST_PAUSE_S = 10.0
LONGEST_PAUSE_S = 600.0
"""Between two tries to load the same."""

logger = logging.getLogger(__name__)


class ModelSource(StrictConfig):
    """Where a service finds its model and catalogue."""

    out: Path | None = None
    """Output directory of runs, whose model in production is served."""
    bundle: Path | None = None
    """Or one bundle, for good."""
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
            return ServedModel(date=None, artifact_id=None, bundle=str(self.bundle))
        assert self.out is not None
        model = require_production(self.out)
        return ServedModel(
            date=model.date, artifact_id=model.manifest.artifact_id, bundle=str(model.bundle)
        )

    def root_of(self, model: ServedModel) -> Path:
        """Directory of its items.parquet and users.parquet.

        Raises:
            UserError: it is no bundle.
        """
        return self.data or describe(Path(model.bundle)).recipe.data.root

    def load(self, model: ServedModel, before: "Loaded | None" = None) -> "Loaded":
        """Load a model with the catalogue as it is now, and try it.

        Args:
            model: from `current`.
            before: what is served so far; of the same bundle only the catalogue is read.

        Raises:
            UserError: the bundle or the catalogue cannot be used.
        """
        directory = Path(model.bundle)
        root = self.root_of(model)
        catalogue = _catalogue(root)  # of before it is read: rewritten meanwhile, it is read again
        sources = feature_sources(describe(directory), directory, root)  # fails before the tables
        if before is not None and before.model == model:
            predictor = before.predictor
        else:
            predictor = Predictor(directory)
        if self.encode_new_items and predictor.content is not None:
            from deploy.new_items import add_new_items  # transformers: seconds, for content only

            # Vectors are added behind those that batches read meanwhile.
            new = add_new_items(predictor, root / "items.parquet", lambda *_: None)
            logger.info("%s: %s", root, new)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Loaded(model, predictor, Scorer(predictor, sources), catalogue, now)


@dataclass(frozen=True)
class Loaded:
    """A model that answers."""

    model: ServedModel
    predictor: Predictor
    scorer: Scorer
    catalogue: str
    """Fingerprint of its items and users."""
    loaded_at: str


class LiveModel:
    """The loaded model of one replica."""

    def __init__(self, source: ModelSource) -> None:
        """Load what is in production.

        Raises:
            UserError: there is none, or it cannot be used.
        """
        self.source = source
        self.last_error: str | None = None
        self._now = source.load(source.current())
        self._failed: tuple[ServedModel, str] | None = None
        """Model and catalogue that could not be loaded."""
        self._retry_at_s, self._pause_s = 0.0, FIRST_PAUSE_S
        self._stop = threading.Event()

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
            last_error=self.last_error,
        )

    def refresh(self) -> bool:
        """Serve what is in production, with the catalogue as it is; whether that was new.

        Anything that keeps it from loading is logged and kept as `last_error`. The same is tried
        again after a pause, which grows to `LONGEST_PAUSE_S`: loading costs what serving needs.
        """
        now = self._now
        wanted: tuple[ServedModel, str] | None = None
        try:
            model = self.source.current()
            wanted = (model, _catalogue(self.source.root_of(model)))
            if wanted == (now.model, now.catalogue):
                self.last_error, self._failed = None, None
                return False
            if wanted == self._failed and time.monotonic() < self._retry_at_s:
                return False
            self._now = self.source.load(model, now)
        except Exception as error:  # noqa: BLE001 # the older model goes on, whatever it is
            self.last_error = f"{type(error).__name__}: {error}"
            logger.error("goes on with the model of %s: %s", now.model.date, self.last_error)
            self._pause_s = (
                min(2 * self._pause_s, LONGEST_PAUSE_S) if wanted == self._failed else FIRST_PAUSE_S
            )
            self._failed, self._retry_at_s = wanted, time.monotonic() + self._pause_s
            return False
        self.last_error, self._failed = None, None
        logger.info("serves %s", self._now.model)
        return True

    def watch(self, interval_s: float) -> None:
        """Refresh in the background, until `close`; replicas do so at different times."""

        def look() -> None:
            while not self._stop.wait(interval_s * random.uniform(0.8, 1.2)):  # noqa: S311
                self.refresh()

        threading.Thread(target=look, name="model-watch", daemon=True).start()

    def close(self) -> None:
        """End the watching; a model that is being loaded is not waited for."""
        self._stop.set()


def _catalogue(root: Path) -> str:
    return fingerprint(catalogue_files(root))

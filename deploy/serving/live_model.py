"""What a replica serves now, and how it comes to serve something newer without a pause.

The newer model is loaded aside, while the older one answers, and takes its place in one assignment:
a batch is scored by one model, whole. One that cannot be loaded leaves the older one in place.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pydantic import model_validator

from deploy.predictor import Predictor
from deploy.serving.scorer import Scorer
from deploy.serving.wire import ServedModel, ServiceState
from embedding.config import StrictConfig
from pipeline.days import catalogue_files, fingerprint
from pipeline.registry import require_production

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

    def load(self, model: ServedModel, before: "Loaded | None" = None) -> "Loaded":
        """Load a model with the catalogue as it is now.

        Args:
            model: from `current`.
            before: what is served so far; of the same bundle only the catalogue is read.

        Raises:
            UserError: the bundle or the catalogue cannot be used.
        """
        if before is not None and before.model == model:
            predictor = before.predictor
        else:
            predictor = Predictor(Path(model.bundle))
        root = self.data or predictor.bundle.recipe.data.root
        catalogue = _catalogue(root)  # of before it is read: rewritten meanwhile, it is read again
        if self.encode_new_items and predictor.content is not None:
            from deploy.new_items import add_new_items  # transformers: seconds, for content only

            # Vectors are added behind those that batches read meanwhile.
            new = add_new_items(predictor, root / "items.parquet", lambda *_: None)
            logger.info("%s: %s", root, new)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Loaded(model, predictor, Scorer(predictor, root), root, catalogue, now)


@dataclass(frozen=True)
class Loaded:
    """A model that answers."""

    model: ServedModel
    predictor: Predictor
    scorer: Scorer
    data_root: Path
    catalogue: str
    """Fingerprint of its items and users."""
    loaded_at: str

    @property
    def is_stale(self) -> bool:
        """Whether the catalogue is another now."""
        return _catalogue(self.data_root) != self.catalogue


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
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

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
            request=loaded.scorer.form.told(),
            loaded_at=loaded.loaded_at,
            last_error=self.last_error,
        )

    def refresh(self) -> bool:
        """Serve what is in production, with the catalogue as it is; whether that was new.

        Anything that keeps it from loading is logged, kept as `last_error`, and tried again.
        """
        try:
            wanted, now = self.source.current(), self._now
            if wanted == now.model and not now.is_stale:
                self.last_error = None
                return False
            self._now = self.source.load(wanted, now)
        except Exception as error:  # noqa: BLE001 # the older model goes on, whatever it is
            self.last_error = f"{type(error).__name__}: {error}"
            logger.error("goes on with the model of %s: %s", self._now.model.date, self.last_error)
            return False
        self.last_error = None
        logger.info("serves %s", self._now.model)
        return True

    def watch(self, interval_s: float, on_change: Callable[[], None] = lambda: None) -> None:
        """Refresh in the background, until `close`."""

        def look() -> None:
            while not self._stop.wait(interval_s):
                if self.refresh():
                    on_change()

        self._thread = threading.Thread(target=look, name="model-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watching; a model that is being loaded is waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _catalogue(root: Path) -> str:
    return fingerprint(catalogue_files(root))

"""Requests in, probabilities out: a bundle with the columns of its catalogue, in one process.

requests -> event rows -> samples (as join writes them) -> RankingBatch -> Predictor
"""

# Shapes: B candidates of all requests, T tasks.

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deploy.predictor import Predictor
from deploy.serving.event_rows import EventForm, event_rows, together
from deploy.serving.wire import ScoreRequest
from embedding.arrow import SampleColumns
from embedding.errors import UserError
from embedding.loader import list_columns
from pipeline.codes.features import CODES_FILE
from pipeline.samples.join_rows import FeatureSources, Places, join_events


@dataclass(frozen=True)
class Scores:
    """What became of one request."""

    probs_BT: Tensor
    """Of its candidates, in their order."""
    unknown_candidates: int
    unknown_user: bool


class Scorer:
    """Scores requests with one bundle and one state of the catalogue. Not for several threads."""

    def __init__(self, predictor: Predictor, data_root: Path) -> None:
        """Read the catalogue.

        Args:
            predictor: of the bundle.
            data_root: directory of items.parquet and users.parquet.

        Raises:
            UserError: the catalogue breaks the data contract, or lacks what features read.
        """
        recipe = predictor.bundle.recipe
        data = recipe.data.model_copy(update={"root": data_root})
        recipe = recipe.model_copy(update={"data": data})
        codes = None
        if predictor.bundle.codebooks is not None:
            codes = predictor.directory / CODES_FILE
            if CODES_FILE not in predictor.bundle.files:
                raise UserError(
                    f"bundle {predictor.directory} was published without the codes of its items, "
                    "which its model reads; publish it again"
                )
        self.tasks = predictor.tasks
        self._predictor = predictor
        self._sources = FeatureSources.load(recipe, codes)
        self.form = EventForm.of(self._sources)
        self._has_users = len(self._sources.entities["users"].sorted_ids) > 0
        self._columns: dict[frozenset[str], SampleColumns] = {}

    def rows(self, request: ScoreRequest, now_ms: int) -> pa.RecordBatch:
        """The event rows of a request; may run beside `score`.

        Raises:
            UserError: the request does not suit the model.
        """
        return event_rows(request, self.form, now_ms)

    def score(self, requests: Sequence[pa.RecordBatch]) -> list[Scores]:
        """Score the rows of some requests in one batch."""
        events = together(requests)
        places = Places.of(events, self._sources)
        samples = join_events(events, self._sources, places)
        rows = self._sample_columns(samples.schema).rows(samples, torch.arange(len(samples)))
        probs_BT = self._predictor.predict(rows.to_batch(len(samples)))
        found = []
        ends = np.cumsum([len(request) for request in requests]).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            items, users = (places.rows[source][start:stop] for source in ("items", "users"))
            found.append(
                Scores(
                    probs_BT[start:stop],
                    int((items < 0).sum()),
                    self._has_users and bool(users[0] < 0),
                )
            )
        return found

    def _sample_columns(self, schema: pa.Schema) -> SampleColumns:
        """Those of samples some of whose columns hold lists; kept, they have threads."""
        lists = list_columns(schema, self._predictor.schema)
        if lists not in self._columns:
            self._columns[lists] = SampleColumns(
                self._predictor.schema,
                tasks=(),
                list_columns=lists,
                items=self._predictor.item_source,
            )
        return self._columns[lists]

"""Requests in, probabilities out: a bundle with the columns of its catalogue, in one process.

requests -> event rows -> samples (as join writes them) -> RankingBatch -> Predictor
"""

# Shapes: B candidates of all requests, T tasks.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deploy.bundle import Bundle
from deploy.predictor import Predictor
from deploy.serving.event_rows import EventForm, EventRows, event_rows, together
from deploy.serving.wire import ScoreRequest
from embedding.arrow import SampleColumns
from embedding.errors import UserError
from embedding.loader import list_columns
from embedding.raw_ids import ids_or_missing
from pipeline.codes.features import CODES_FILE, ItemCodes
from pipeline.samples.columns import EventColumns, source_columns
from pipeline.samples.contract import BoolArray
from pipeline.samples.join_rows import FeatureSources, Places, join_events
from pipeline.samples.lookup import IdLists


@dataclass(frozen=True)
class Scores:
    """What became of one request."""

    probs_BT: Tensor
    """Of its candidates, in their order."""
    unknown_candidates: int
    unknown_user: bool
    candidates_without_codes: int


def feature_sources(bundle: Bundle, data_root: Path) -> FeatureSources:
    """Read the catalogue, as a bundle's model reads it; codes are the bundle's own.

    Args:
        bundle: of the model.
        data_root: directory of items.parquet and users.parquet.

    Raises:
        UserError: the catalogue breaks the data contract, or lacks what features read.
    """
    data = bundle.recipe.data.model_copy(update={"root": data_root})
    return FeatureSources.load(bundle.recipe.model_copy(update={"data": data}))


def kept_sources(bundle: Bundle, data_root: Path, held: FeatureSources) -> FeatureSources | None:
    """The catalogue that another model holds, as a bundle's model reads it.

    Returns:
        None where it is of another directory, or its model read too little of it.
    """
    if held.recipe.data.root != data_root:
        return None
    for source, entities in held.entities.items():
        wanted = source_columns(bundle.recipe.features, source)
        if not (entities.ids.keys() >= {*wanted.ids} and entities.dense.keys() >= {*wanted.dense}):
            return None
        if any(isinstance(entities.ids[name], IdLists) for name in wanted.sequence):
            return None
    recipe = bundle.recipe.model_copy(update={"data": held.recipe.data})
    return FeatureSources(recipe, EventColumns.of(recipe), held.entities, None)


def item_codes(bundle: Bundle, directory: Path) -> ItemCodes | None:
    """The codes of a bundle's items; None where its model reads none.

    Raises:
        UserError: the bundle lacks them.
    """
    if bundle.codebooks is None:
        return None
    if CODES_FILE not in bundle.files:
        raise UserError(
            f"bundle {directory} was published without the codes of its items, which its model "
            "reads; publish it again"
        )
    return ItemCodes.load(directory / CODES_FILE)


class Scorer:
    """Scores requests with one bundle and one state of the catalogue. Not for several threads."""

    def __init__(self, predictor: Predictor, sources: FeatureSources) -> None:
        """Make everything that requests need, and score one of which nothing is known.

        Args:
            predictor: of the bundle.
            sources: of its items and users.

        Raises:
            UserError: the bundle does not say what its log held, or scores nothing finite.
        """
        self.tasks = predictor.tasks
        self.form = EventForm.of(sources.recipe, predictor.bundle.event_columns)
        self.sources = sources
        self._predictor = predictor
        self._has_users = len(sources.entities["users"].sorted_ids) > 0
        blank = EventRows.blank(self.form)
        # The same for every request: which columns hold lists is the form's.
        (samples, *_) = self._samples([blank])
        lists = list_columns(samples.schema, predictor.schema)
        self._columns = SampleColumns(
            predictor.schema, tasks=(), list_columns=lists, items=predictor.item_source
        )
        (trial,) = self.score([blank])  # what does not fit shows before it is served
        if not trial.probs_BT.isfinite().all():
            raise UserError(
                f"the model of bundle {predictor.directory} gives probabilities that are not finite"
            )

    def rows(self, request: ScoreRequest, now_ms: int) -> EventRows:
        """The event rows of a request; may run beside `score`.

        Raises:
            UserError: the request does not suit the model.
        """
        return event_rows(request, self.form, now_ms)

    def score(self, requests: Sequence[EventRows]) -> list[Scores]:
        """Score the rows of some requests in one batch."""
        samples, places, has_codes_B = self._samples(requests)
        rows = self._columns.rows(samples, torch.arange(len(samples)))
        probs_BT = self._predictor.predict(rows.to_batch(len(samples)))
        found = []
        for start, stop in pairwise(accumulate(map(len, requests), initial=0)):
            items, users = (places.rows[source][start:stop] for source in ("items", "users"))
            found.append(
                Scores(
                    probs_BT[start:stop],
                    int((items < 0).sum()),
                    self._has_users and bool(users[0] < 0),
                    int((~has_codes_B[start:stop]).sum()),
                )
            )
        return found

    def _samples(self, requests: Sequence[EventRows]) -> tuple[pa.Table, Places, BoolArray]:
        """Samples, where their items and users lie, and which candidates the codes know."""
        events, codes = together(requests), self.sources.codes
        places = Places.of(events, self.sources)
        has_codes_B = np.ones(len(events), np.bool_)
        if codes is not None:
            has_codes_B = codes.entities.positions(ids_or_missing(events["item_id"])) >= 0
        return join_events(events, self.sources, places), places, has_codes_B

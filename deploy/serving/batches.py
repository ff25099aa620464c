"""Requests that are scored together."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from deploy.serving.live_model import Loaded
from deploy.serving.scorer import Scores

MAX_ROWS = 16_384
"""Candidates that are scored at once: bounds the memory of a batch."""


@dataclass(frozen=True)
class Asked:
    """A request that waits for its batch."""

    loaded: Loaded
    """The model that its rows suit: there may be a newer one when the batch begins."""
    rows: pa.RecordBatch


def score_together(asked: Sequence[Asked]) -> list[Scores | Exception]:
    """Scores of each, in their order; what is wrong with one request does not end the others."""
    found: list[Scores | Exception] = []
    for group in grouped(asked):
        try:
            found += group[0].loaded.scorer.score([one.rows for one in group])
        except Exception as error:  # noqa: BLE001 # it is raised where its request is answered
            alone = len(group) == 1
            found += [error] if alone else [score_together([one])[0] for one in group]
    return found


def grouped(asked: Sequence[Asked], max_rows: int = MAX_ROWS) -> list[list[Asked]]:
    """Neighbours that one model scores at once: `max_rows` rows, unless a single one has more."""
    found: list[list[Asked]] = []
    rows = 0
    for one in asked:
        fits = rows + len(one.rows) <= max_rows
        if found and fits and found[-1][0].loaded is one.loaded:
            found[-1].append(one)
            rows += len(one.rows)
        else:
            found.append([one])
            rows = len(one.rows)
    return found

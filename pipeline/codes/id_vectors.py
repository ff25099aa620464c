"""Item vectors from behaviour, for User2Item pairs: which items users hold for alike.

Those of the ranker's item table, as the run that this one starts from trained it. Where there is no
such run (on the first day), those of a factorisation of the training days' positives, so a pair
never knows what came later.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from embedding.raw_ids import Int64Array
from multimodal.codes.factorisation import UserBlock, item_factors
from multimodal.codes.triggers import IdVectors
from pipeline.codes.positives import PairSource, UserBuckets, read_positives
from pipeline.codes.ranker_vectors import RankerItems, ranker_vectors
from pipeline.tasks import stream_tasks

MAX_DIM = 32
_MATRICES = "matrices"
_ROWS_PER_TASK = 1 << 20


@dataclass(frozen=True)
class IdSpace:
    """ID vectors and where they come from."""

    vectors: IdVectors | None
    """None where there is too little behaviour."""
    kind: Literal["ranker", "factorisation"] | None
    """The ranker's item table, or a factorisation of positives; None: none was asked for."""


def id_space(
    source: PairSource, ranker: RankerItems | None, scratch: Path, seed: int = 0
) -> IdSpace:
    """Vectors of items by behaviour; needs an initialised Ray.

    Args:
        source: the training days' positives.
        ranker: of the run that this one starts from; None: it starts from none.
        scratch: an existing directory, left as it was.
        seed: of the factorisation.
    """
    found = None if ranker is None else ranker_vectors(ranker)
    if found is not None:
        return IdSpace(found, "ranker")
    return IdSpace(factorised_vectors(source, scratch, seed), "factorisation")


def factorised_vectors(source: PairSource, scratch: Path, seed: int = 0) -> IdVectors | None:
    """Vectors of all items with a positive; None where there are too few users or items.

    Buckets of users become matrices on disk; the factorisation goes over these, one in memory at a
    time.
    """
    num_events = source.num_events()
    if not num_events:
        return None
    folder = scratch / _MATRICES
    folder.mkdir()
    try:
        buckets = source.split_users(num_events)
        numbers = range(buckets.number)
        plan = _MatrixPlan(source, buckets, folder)
        rows = [_ROWS_PER_TASK] * len(numbers)
        num_users = sum(stream_tasks(write_matrix, numbers, plan, rows))
        files = sorted(folder.glob("*.npz"))
        items: Int64Array = np.empty(0, np.int64)
        for file in files:
            with np.load(file) as part:
                items = np.union1d(items, part["items"])
        dim = min(MAX_DIM, num_users - 1, len(items) - 1)
        if dim < 1:
            return None
        factors_ND = item_factors(lambda: _blocks(files, items), len(items), dim, seed)
        return IdVectors.of(items, factors_ND)
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _MatrixPlan:
    source: PairSource
    buckets: UserBuckets
    folder: Path


def write_matrix(bucket: int, plan: _MatrixPlan) -> int:
    """Write the matrix of one bucket of users and its positive items; its number of users.

    An entry is log(1 + positives) over the root of its user's sum: a heavy user's positive says
    less about what items have in common.
    """
    events = read_positives(plan.source, bucket, plan.buckets, with_past=False)
    if not events.num_rows:
        return 0
    users, user_rows = np.unique(events["user_id"].to_numpy(), return_inverse=True)
    items, item_rows = np.unique(events["item_id"].to_numpy(), return_inverse=True)
    ones = np.ones(len(user_rows), np.float32)
    matrix = csr_array((ones, (user_rows, item_rows)), shape=(len(users), len(items)))
    matrix.data = np.log1p(matrix.data)
    per_user = np.sqrt(matrix.sum(axis=1))
    matrix.data /= np.repeat(per_user, np.diff(matrix.indptr))
    np.savez(
        plan.folder / f"bucket-{bucket:04d}.npz",
        items=items,
        data=matrix.data,
        indices=matrix.indices,
        indptr=matrix.indptr,
    )
    return len(users)


def _blocks(files: list[Path], items_N: Int64Array) -> Iterator[UserBlock]:
    for file in files:
        with np.load(file) as part:
            own = part["items"]
            shape = (len(part["indptr"]) - 1, len(own))
            values = csr_array((part["data"], part["indices"], part["indptr"]), shape=shape)
        yield UserBlock(values, np.searchsorted(items_N, own))

"""Item vectors from behaviour alone, for User2Item pairs: a truncated SVD of users x items.

Fitted to the positives of the training days, so a pair never knows what came later. It stands for
the ranker's item table, which does not exist on the first day and whose rows items may share.
"""

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from multimodal.triggers import IdVectors
from pipeline.mine_pairs import PairSource, read_positives, without_held_out

MAX_DIM = 32


def id_vectors(source: PairSource, seed: int = 0) -> IdVectors | None:
    """Vectors of all items with a positive; None where there are too few users or items."""
    files = [
        file
        for path in source.artifacts
        for day in source.days
        for file in sorted((path / "events" / f"dt={day}").glob("*.parquet"))
    ]
    if not files:
        return None
    names = ["user_id", "item_id", *([source.history.label] if source.history.label else [])]
    events = pa.concat_tables([read_positives(f, names, source.history.label) for f in files])
    events = without_held_out(events, source.held_out)
    users, user_rows = np.unique(events["user_id"].to_numpy(), return_inverse=True)
    items, item_rows = np.unique(events["item_id"].to_numpy(), return_inverse=True)
    dim = min(MAX_DIM, len(users) - 1, len(items) - 1)
    if dim < 1:
        return None
    ones = np.ones(len(user_rows), np.float64)
    counts = csr_array((ones, (user_rows, item_rows)), shape=(len(users), len(items)))
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data)
    # A heavy user's positive says less about what items have in common.
    per_user = np.sqrt(np.maximum(counts.sum(axis=1), 1e-9))
    scaled = counts.multiply(1 / per_user[:, None]).tocsr()
    _, values, right = svds(scaled, k=dim, random_state=seed)
    return IdVectors.of(items, (right.T * values).astype(np.float32))

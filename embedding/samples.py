"""Column names of a sample table: what `join` writes and the loader reads.

A sample is one impression, joined with its user, its item and its point-in-time histories. Prefixes
keep features, labels and keys apart, so that a feature may be called `user_id`.

    key:request_id  key:user_id  key:item_id   int64, never null (strings become 63-bit hashes)
    key:timestamp                              int64, milliseconds since the epoch, UTC
    label:<task>                               float32, 0 or 1; null where the task is not observed
    weight:<task>                              float32, 0 or more, never null; without the column
                                               every row weighs 1
    probability:<task>                         float32; in predictions only
    oracle:<task>                              float32, true probability (synthetic data only)
    sparse:<feature>                           int64 or list<int64>; MISSING_ID for null
    dense:<feature>                            float32, transformed and scaled; never null or NaN
    sequence:<feature>                         list<int64>; oldest first; equal lengths a history
"""

KEYS = ("request_id", "user_id", "item_id", "timestamp")
CODEBOOKS = b"codebooks"
"""Key of the file's metadata that names the codebooks of its codes: only models that were trained
with the same ones can read them."""


def key_column(name: str) -> str:
    """Column of a key."""
    return f"key:{name}"


def label_column(task: str) -> str:
    """Column of a task's label."""
    return f"label:{task}"


def weight_column(task: str) -> str:
    """Column of a task's row weights."""
    return f"weight:{task}"


def probability_column(task: str) -> str:
    """Column of a task's predicted probability."""
    return f"probability:{task}"


def oracle_column(task: str) -> str:
    """Column of a task's true probability."""
    return f"oracle:{task}"


def sparse_column(feature: str) -> str:
    """Column of a sparse feature."""
    return f"sparse:{feature}"


def dense_column(feature: str) -> str:
    """Column of a dense feature."""
    return f"dense:{feature}"


def sequence_column(feature: str) -> str:
    """Column of a sequence feature."""
    return f"sequence:{feature}"

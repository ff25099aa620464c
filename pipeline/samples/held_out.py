"""Items kept from training and evaluated alone: how well a model ranks what it never saw.

Which items is a matter of their id and the seed, so all days, stages and machines agree.
"""

# Shapes: N events of all histories.

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, mix64
from pipeline.config import HeldOutItems
from pipeline.samples.columns import EventColumns, history_column

_GRAINS = 1 << 53


def is_held_out(item_ids: Int64Array, config: HeldOutItems) -> np.ndarray:
    """True for items that are kept from training."""
    salt = mix64(np.array([config.seed], np.int64))
    mixed = mix64((item_ids.view(np.uint64) ^ salt).view(np.int64))
    held_out: np.ndarray = (mixed >> np.uint64(11)) < np.uint64(config.share * _GRAINS)
    return held_out


def forget_held_out(
    events: pa.RecordBatch, columns: EventColumns, config: HeldOutItems
) -> pa.RecordBatch:
    """Ingested events whose histories lack the events of held-out items."""
    for history, values in columns.history_columns.items():
        items = events[history_column(history, "item_id")]
        keep_N = ~is_held_out(items.flatten().to_numpy(zero_copy_only=False), config)
        lengths = items.value_lengths().to_numpy()
        kept_before = np.concatenate([[0], np.cumsum(keep_N)])
        ends = np.cumsum(lengths)
        offsets = pa.array(kept_before[np.concatenate([[0], ends])].astype(np.int32))
        for value in values:
            name = history_column(history, value)
            kept = pc.filter(events[name].flatten(), pa.array(keep_N))
            lists = pa.ListArray.from_arrays(offsets, kept)
            events = events.set_column(events.schema.get_field_index(name), name, lists)
    return events


def require_held_out(files: list[Path]) -> list[Path]:
    """The sample files of held-out items.

    Raises:
        UserError: there are none.
    """
    if not files:
        raise UserError(
            "evaluation.held_out_items: no event of the evaluated days shows a held-out item; "
            "raise share, set days to all, or evaluate more days (window.eval_days)"
        )
    return files

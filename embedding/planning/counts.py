"""The counts that a step's time is made of, each with the phase it costs time in."""

import numpy as np

from embedding.planning.plan_description import PHASES

COUNTS: tuple[tuple[str, str], ...] = (
    ("input_calls", "input_dist"),
    ("input_sent_ids", "input_dist"),
    ("input_received_ids", "input_dist"),
    ("input_lengths", "input_dist"),
    ("input_bucketized_ids", "input_dist"),
    ("input_managed_ids", "input_dist"),
    ("input_inter_bytes", "input_dist"),
    ("prefetch_calls", "prefetch"),
    ("prefetch_ids", "prefetch"),
    ("prefetch_bytes", "prefetch"),
    ("lookup_calls", "lookup"),
    ("lookup_bags", "lookup"),
    ("lookup_ids", "lookup"),
    ("lookup_bytes", "lookup"),
    ("lookup_unique_bytes", "lookup"),
    ("lookup_host_bytes", "lookup"),
    ("replicated_lookup_bytes", "lookup"),
    ("exchange_calls", "output_dist"),
    ("exchange_bytes", "output_dist"),
    ("reduce_calls", "output_dist"),
    ("reduce_bytes", "output_dist"),
    ("output_inter_bytes", "output_dist"),
    ("output_bytes", "output_dist"),
    ("backward_calls", "backward"),
    ("backward_exchange_bytes", "backward"),
    ("backward_gather_bytes", "backward"),
    ("backward_inter_bytes", "backward"),
    ("update_ids", "backward"),
    ("update_bytes", "backward"),
    ("update_unique_rows", "backward"),
    ("update_unique_bytes", "backward"),
    ("update_host_bytes", "backward"),
    ("replicated_calls", "backward"),
    ("replicated_table_bytes", "backward"),
    ("replicated_update_bytes", "backward"),
    ("all_reduce_bytes", "backward"),
    ("all_reduce_inter_bytes", "backward"),
)
"""Every count with the phase it costs time in."""

COUNT_NAMES = tuple(name for name, _ in COUNTS)
NUM_COUNTS = len(COUNTS)
COUNT_INDEX = {name: index for index, name in enumerate(COUNT_NAMES)}
PHASE_OF_COUNT = np.array([PHASES.index(phase) for _, phase in COUNTS])

"""Item pairs for alignment, mined from the positives of a training period by Ray tasks.

Reads the event files of ingest artifacts. Writes

    item2item/part-NNNN.parquet   item, neighbour, similarity, num_common_users (Swing)
    user2item/part-NNNN.parquet   trigger, target, similarity

Two passes. The first takes one bucket of users: it cuts their item lists, finds their User2Item
pairs, and files every list under each item partition that it touches. The second takes one
partition of items, which now holds all lists of all its items' users, and finishes its Swing
similarities. Memory is bounded by a bucket and, about, by the lists of a partition; the result does
not depend on the number of either.
"""

import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, mix64
from multimodal.codes.pair_config import Swing, User2Item
from multimodal.codes.swing import UserLists, join_lists, swing_pairs, user_lists
from multimodal.codes.triggers import IdVectors, TriggerPairs, trigger_pairs
from pipeline.codes.align_facts import PairFacts, PairSample
from pipeline.codes.pair_sample import join_samples, sample_pairs
from pipeline.codes.positives import PairSource, UserBuckets, read_positives
from pipeline.samples.partition import read_bucket
from pipeline.tasks import stream_tasks

ROWS_PER_PARTITION = 1 << 20
ENTRIES_PER_PARTITION = 1 << 23
"""Items in all lists of a partition that its task holds at a time, some 60 bytes each."""
MOST_PARTITIONS = 1 << 12
"""Every bucket's file has a record batch for each."""
NUM_EXAMPLES = 20

_LISTS = pa.schema(
    [("user_id", pa.int64()), ("total", pa.int64()), ("items", pa.list_(pa.int64()))]
)


@dataclass(frozen=True)
class MiningPlan:
    """What every task needs to know."""

    source: PairSource
    swing: Swing
    user2item: User2Item
    vectors: IdVectors | None
    """ID vectors; without them no User2Item pairs are mined."""
    buckets: UserBuckets
    num_partitions: int
    scratch: Path


@dataclass(frozen=True)
class _BucketFacts:
    positives: int
    users: int
    cut_users: int
    pairs: int
    without: dict[str, int]
    sample: PairSample


@dataclass(frozen=True)
class _PartitionFacts:
    pairs: int
    items: int
    cut_items: int
    examples: tuple[tuple[int, int, float], ...]
    sample: PairSample


def plan_mining(
    source: PairSource,
    swing: Swing,
    user2item: User2Item,
    vectors: IdVectors | None,
    scratch: Path,
) -> MiningPlan:
    """Sizes of both passes.

    Raises:
        UserError: the period holds no events.
    """
    rows = source.num_events()
    if not rows:
        raise UserError(
            f"no events between {source.days[0]} and {source.days[-1]} in "
            f"{[str(path) for path in source.artifacts]}; ingest these days first"
        )
    return MiningPlan(
        source=source,
        swing=swing,
        user2item=user2item,
        vectors=vectors,
        buckets=source.split_users(rows),
        num_partitions=num_partitions(
            math.ceil(rows * source.share_positive), swing.max_items_per_user
        ),
        scratch=scratch,
    )


def num_partitions(positives: int, max_items_per_user: int) -> int:
    """Partitions of items for a number of positives.

    A list is filed whole under each partition that it touches, so lists of up to L items are filed
    up to L times, and P partitions hold `positives * min(L, P) / P` entries each at most, on the
    average: one partition holds all of them once, and more hold no less unless P is beyond L.

    Returns:
        So many that no more than `ENTRIES_PER_PARTITION` are to be expected, whatever the lengths
        of the lists, but `MOST_PARTITIONS` at most (unless there are more positives than that);
        at least one for `ROWS_PER_PARTITION` positives, which are tasks to share.
    """
    least = 1 + positives // ROWS_PER_PARTITION
    if positives <= ENTRIES_PER_PARTITION:
        return least
    bound = 1 + positives * max_items_per_user // ENTRIES_PER_PARTITION
    return max(least, min(bound, MOST_PARTITIONS))


def mine_pairs(plan: MiningPlan) -> PairFacts:
    """Write the pairs into `plan.scratch`; needs an initialised Ray."""
    for folder in ("lists", "item2item", "user2item"):
        (plan.scratch / folder).mkdir(parents=True)
    buckets = range(plan.buckets.number)
    users = list(stream_tasks(mine_bucket, buckets, plan, [ROWS_PER_PARTITION] * len(buckets)))
    parts = range(plan.num_partitions)
    items = list(stream_tasks(mine_partition, parts, plan, [ROWS_PER_PARTITION] * len(parts)))
    shutil.rmtree(plan.scratch / "lists")
    without: Counter[str] = Counter()
    for facts in users:
        without.update(facts.without)
    examples = sorted((e for f in items for e in f.examples), key=lambda e: (-e[2], e[:2]))
    return PairFacts(
        first_day=plan.source.days[0],
        last_day=plan.source.days[-1],
        num_positives=sum(f.positives for f in users),
        num_users=sum(f.users for f in users),
        num_cut_users=sum(f.cut_users for f in users),
        num_cut_items=sum(f.cut_items for f in items),
        item2item_pairs=sum(f.pairs for f in items),
        item2item_items=sum(f.items for f in items),
        user2item_pairs=sum(f.pairs for f in users),
        user2item_without=dict(without),
        examples=tuple(examples[:NUM_EXAMPLES]),
        samples={
            "item2item": join_samples(f.sample for f in items),
            "user2item": join_samples(f.sample for f in users),
        },
    )


def mine_bucket(bucket: int, plan: MiningPlan) -> _BucketFacts:
    """Item lists and User2Item pairs of one bucket of users."""
    events = read_positives(plan.source, bucket, plan.buckets, with_past=True)
    lists = user_lists(events["user_id"].to_numpy(), events["item_id"].to_numpy(), plan.swing)
    _write_lists(lists, plan.scratch / "lists" / f"bucket-{bucket:04d}.arrow", plan.num_partitions)
    pairs, without = 0, dict[str, int]()
    sample: PairSample = ()
    if plan.vectors is not None:
        found = _triggers(events, plan.vectors, plan)
        pairs, without = len(found.rows), found.counts
        sample = sample_pairs(found.triggers, found.targets, found.similarities)
        table = pa.table(
            {"trigger": found.triggers, "target": found.targets, "similarity": found.similarities}
        )
        pq.write_table(table, plan.scratch / "user2item" / f"part-{bucket:04d}.parquet")
    return _BucketFacts(
        events.num_rows, len(lists.user_ids_U), lists.num_cut, pairs, without, sample
    )


def mine_partition(partition: int, plan: MiningPlan) -> _PartitionFacts:
    """Swing neighbours of one partition of items."""
    files = sorted((plan.scratch / "lists").glob("*.arrow"))
    lists = join_lists([_read_lists(path, partition) for path in files])
    items = np.unique(lists.items_N)
    mine = items[item_partitions(items, plan.num_partitions) == partition]
    found = swing_pairs(lists, plan.swing, mine)
    table = pa.table(
        {
            "item": found.items,
            "neighbour": found.neighbours,
            "similarity": found.similarities,
            "num_common_users": found.num_common_users,
        }
    )
    pq.write_table(table, plan.scratch / "item2item" / f"part-{partition:04d}.parquet")
    best = np.lexsort((found.neighbours, found.items, -found.similarities))[:NUM_EXAMPLES]
    return _PartitionFacts(
        pairs=table.num_rows,
        items=len(np.unique(found.items)),
        cut_items=found.num_cut_items,
        examples=tuple(
            (int(found.items[i]), int(found.neighbours[i]), float(found.similarities[i]))
            for i in best
        ),
        sample=sample_pairs(found.items, found.neighbours, found.similarities),
    )


def item_partitions(item_ids: Int64Array, num_partitions: int) -> Int64Array:
    """The partition of each item."""
    return np.asarray((mix64(item_ids) % np.uint64(num_partitions)).astype(np.int64))


def _triggers(events: pa.Table, vectors: IdVectors, plan: MiningPlan) -> TriggerPairs:
    past = events[plan.source.past].combine_chunks()
    lengths = pc.list_value_length(past).to_numpy(zero_copy_only=False).astype(np.int64)
    return trigger_pairs(
        events["item_id"].to_numpy(),
        np.concatenate([[0], np.cumsum(lengths)]),
        past.flatten().to_numpy(),
        vectors,
        plan.user2item,
    )


def _write_lists(lists: UserLists, path: Path, num_partitions: int) -> None:
    """One record batch a partition: the lists that hold an item of it."""
    table = pa.record_batch(
        [
            pa.array(lists.user_ids_U),
            pa.array(lists.totals_U),
            pa.ListArray.from_arrays(
                pa.array(lists.offsets.astype(np.int32)), pa.array(lists.items_N)
            ),
        ],
        schema=_LISTS,
    )
    owner_N = item_partitions(lists.items_N, num_partitions)
    row_N = np.repeat(np.arange(len(lists.user_ids_U)), lists.lengths)
    touched = np.unique(owner_N * max(1, len(lists.user_ids_U)) + row_N)
    partition, row = np.divmod(touched, max(1, len(lists.user_ids_U)))
    edges = np.searchsorted(partition, np.arange(num_partitions + 1))
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(str(path), _LISTS, options=options) as writer:
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            writer.write_batch(table.take(pa.array(row[start:end])))


def _read_lists(path: Path, partition: int) -> UserLists:
    batch = read_bucket(path, partition)
    lengths = batch["items"].value_lengths().to_numpy(zero_copy_only=False)
    return UserLists(
        user_ids_U=batch["user_id"].to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items_N=batch["items"].flatten().to_numpy(),
        totals_U=batch["total"].to_numpy(),
    )

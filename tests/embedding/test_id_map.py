"""Ids that move to other shards; reset of evicted rows."""

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor

from embedding.config import ManagedCollision
from embedding.hashing import MANAGED_ID_RANGE, NO_ID
from embedding.id_map import (
    by_row,
    clock_of,
    insert_ids,
    managed_modules,
    owned_by,
    owner_of,
    pending_of,
    set_by_row,
    set_pending,
)
from embedding.managed_collision import reset_states
from embedding.tables import EmbeddingTables
from tests.embedding.toy import CPU, toy_schema


def module(eviction: str = "lfu", interval: int = 100, scale: int = 1):
    """The unsharded collision module of a table of 17 * scale rows."""
    ids = ManagedCollision(eviction=eviction, eviction_interval_steps=interval)
    schema = toy_schema("row_wise", ids, scale)
    return managed_modules(EmbeddingTables(schema, CPU))["genre"]


def restored(saved, interval: int, scale: int = 1, eviction: str = "lfu"):
    """A module that goes on where `saved` is, with an interval and a policy of its own."""
    mch = module(eviction, interval=interval, scale=scale)
    set_by_row(mch, by_row(saved), clock_of(saved).iteration)
    set_pending(mch, pending_of(saved), clock_of(saved))
    return mch


def feed(mch, batches: range, batch_size: int) -> set[int]:
    """Train on batches of ids never seen before; the ids."""
    for batch in batches:
        ids = torch.arange(batch * batch_size, (batch + 1) * batch_size)
        mch({"genres": JaggedTensor(ids, lengths=torch.ones_like(ids))})
    return set(range(batches.start * batch_size, batches.stop * batch_size))


def owners(mch) -> set[int]:
    """Ids that own a row."""
    ids = by_row(mch)["ids"]
    return set(ids[ids != NO_ID].tolist())


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(0, MANAGED_ID_RANGE, (count,), generator=torch.Generator().manual_seed(3))


def test_owner_is_the_equal_bucket_an_id_falls_in() -> None:
    edges = torch.tensor(
        [0, MANAGED_ID_RANGE // 2 - 1, MANAGED_ID_RANGE // 2, MANAGED_ID_RANGE - 1]
    )
    assert owner_of(edges, 2).tolist() == [0, 0, 1, 1]
    assert set(owner_of(random_ids(1000), 3).tolist()) == {0, 1, 2}


def test_by_row_and_back() -> None:
    mch = module()
    state = {"ids": torch.full((17,), NO_ID), "counts": torch.zeros(17, dtype=torch.int64)}
    state["ids"][:5] = torch.tensor([50, 10, 40, 20, 30])
    state["counts"][:5] = torch.arange(1, 6)
    set_by_row(mch, state, 0)
    assert mch._mch_sorted_raw_ids[:5].tolist() == [10, 20, 30, 40, 50]
    assert mch._mch_remapped_ids_mapping[:5].tolist() == [1, 3, 4, 2, 0]
    assert all(torch.equal(by_row(mch)[name], state[name]) for name in state)


def test_every_owned_id_is_inserted_once() -> None:
    ids = random_ids(20)
    saved = {"ids": torch.cat([ids, torch.tensor([NO_ID])]), "counts": torch.arange(21)}
    inserted: list[int] = []
    for rank in range(3):
        rows = owned_by(saved["ids"], rank, world_size=3)
        insertion = insert_ids(module(), rows, {name: v[rows] for name, v in saved.items()})
        kept = insertion.state["ids"][: insertion.saved_rows_K.numel()]
        assert torch.equal(kept, saved["ids"][insertion.saved_rows_K])
        assert torch.equal(insertion.state["counts"][: kept.numel()], insertion.saved_rows_K)
        inserted += kept.tolist()
    assert sorted(inserted) == sorted(ids.tolist())


def test_a_full_shard_keeps_the_most_valuable_ids_and_counts_the_others() -> None:
    cases = {
        "lfu": {"counts": torch.randperm(40)},
        "lru": {"last_access_iter": torch.randperm(40)},
        "distance_lfu": {
            "counts": torch.randint(1, 100, (40,)),
            "last_access_iter": torch.randperm(40),
        },
    }
    for eviction, metadata in cases.items():
        saved = {"ids": random_ids(40), **metadata}
        insertion = insert_ids(module(eviction), torch.arange(40), saved)
        if eviction == "distance_lfu":
            age = metadata["last_access_iter"].max() - metadata["last_access_iter"] + 1
            value = metadata["counts"] / age
        else:
            (value,) = metadata.values()
        best = set(sorted(range(40), key=lambda row, value=value: -float(value[row]))[:16])
        assert insertion.num_dropped == 24
        assert set(insertion.saved_rows_K.tolist()) == best
        assert insertion.state["ids"][16] == NO_ID


def test_eviction_goes_on_with_a_shorter_interval() -> None:
    for steps in (0, 1, 19, 20, 55):
        saved = module(interval=20, scale=100)
        seen = feed(saved, range(steps), 3)
        for interval in (1, 7, 19, 20, 40):
            mch = restored(saved, interval, scale=100)
            seen_too = seen | feed(mch, range(steps, steps + interval), 3)
            # One interval at most after the restart, everything seen until then owns a row.
            missing = seen_too - owners(mch)
            assert len(missing) < 3 * interval, (steps, interval)
            assert owners(mch), (steps, interval)


def test_no_id_is_forgotten_before_the_next_eviction() -> None:
    """Whatever came first: small batches, an empty one, another interval."""
    for eviction in ("lfu", "lru", "distance_lfu"):
        mch = module(eviction, interval=10, scale=100)
        feed(mch, range(1), 0)
        seen = feed(mch, range(4), 2) | feed(mch, range(1, 6), 50)
        assert owners(mch) == seen, eviction
    saved = module(interval=4, scale=100)
    seen = feed(saved, range(6), 2)
    mch = restored(saved, interval=12, scale=100)
    seen |= feed(mch, range(1, 11), 50)
    assert owners(mch) == seen


def test_ids_stay_under_another_policy_and_give_way_to_more_wanted_ones() -> None:
    for before in ("lfu", "lru", "distance_lfu"):
        for after in ("lfu", "lru", "distance_lfu"):
            saved = module(before, interval=4)
            known = feed(saved, range(4), 2) | feed(saved, range(4, 5), 2)
            assert len(owners(saved)) == 8, "two ids wait for the next eviction"
            mch = restored(saved, interval=4, eviction=after)
            assert owners(mch) == owners(saved)
            feed(mch, range(4, 8), 0)
            assert owners(mch) == known, (before, after)
            wanted = set(range(100, 116))
            for _ in range(8):  # of 16 rows that ids can own
                ids = torch.tensor(sorted(wanted))
                mch({"genres": JaggedTensor(ids, lengths=torch.ones_like(ids))})
            assert owners(mch) == wanted, (before, after)


def test_reset_clears_row_wise_and_element_wise_states() -> None:
    row_wise, element_wise = torch.ones(5), torch.ones(5, 4)
    reset_states([row_wise, element_wise], torch.tensor([1, 3]))
    for row in range(5):
        expected = 0.0 if row in (1, 3) else 1.0
        assert row_wise[row] == expected
        assert (element_wise[row] == expected).all()

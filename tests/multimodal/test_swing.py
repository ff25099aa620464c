"""Swing against three nested loops."""

from itertools import combinations

import numpy as np
import pytest

from multimodal.codes.pair_config import Swing
from multimodal.codes.swing import UserLists, join_lists, swing_pairs, user_lists

Log = tuple[np.ndarray, np.ndarray]


def random_log(num_users: int = 40, num_items: int = 25, events: int = 400, seed: int = 0) -> Log:
    rng = np.random.default_rng(seed)
    popular = rng.zipf(1.4, events) % num_items
    return rng.integers(0, num_users, events) * 7 + 1000, popular * 3 + 50


def naive_swing(users: np.ndarray, items: np.ndarray, alpha: float) -> dict[tuple[int, int], float]:
    engaged: dict[int, set[int]] = {}
    for user, item in zip(users.tolist(), items.tolist(), strict=True):
        engaged.setdefault(user, set()).add(item)
    similarity: dict[tuple[int, int], float] = {}
    for u, v in combinations(engaged, 2):
        both = engaged[u] & engaged[v]
        weight = len(engaged[u]) ** -0.5 * len(engaged[v]) ** -0.5 / (alpha + len(both))
        for i in both:
            for j in both - {i}:
                similarity[i, j] = similarity.get((i, j), 0.0) + weight
    return similarity


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_similarities_equal_three_nested_loops(alpha: float) -> None:
    users, items = random_log()
    config = Swing(alpha=alpha, num_neighbours=1000, min_common_users=2)

    pairs = swing_pairs(user_lists(users, items, config), config)

    found = dict(
        zip(
            zip(pairs.items.tolist(), pairs.neighbours.tolist(), strict=True),
            pairs.similarities.tolist(),
            strict=True,
        )
    )
    expected = naive_swing(users, items, alpha)
    assert len(expected) > 100
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_most_similar_stable_neighbours_are_kept() -> None:
    users, items = random_log()
    config = Swing(num_neighbours=3, min_common_users=4)

    pairs = swing_pairs(user_lists(users, items, config), config)

    similarity = naive_swing(users, items, 1.0)
    engaged = {i: set(users[items == i].tolist()) for i in set(items.tolist())}
    for item in engaged:
        stable = [j for j in engaged if j != item and len(engaged[item] & engaged[j]) >= 4]
        best = sorted(stable, key=lambda j: (-similarity[item, j], j))[:3]
        mine = pairs.items == item
        assert pairs.neighbours[mine].tolist() == best
        common = [len(engaged[item] & engaged[j]) for j in best]
        assert pairs.num_common_users[mine].tolist() == common


def test_item_partitions_together_are_the_whole() -> None:
    users, items = random_log()
    config = Swing(num_neighbours=5, min_common_users=2)
    whole = swing_pairs(user_lists(users, items, config), config)

    parts = []
    for remainder in range(3):
        mine = np.unique(items[items % 3 == remainder])
        # Only the users who engaged with an item of the partition, in two buckets of users.
        touching = np.isin(users, users[np.isin(items, mine)])
        buckets = [
            user_lists(
                users[touching & (users % 2 == b)], items[touching & (users % 2 == b)], config
            )
            for b in range(2)
        ]
        parts.append(swing_pairs(join_lists(buckets), config, items=mine))

    def rows(pairs: list) -> set:
        return {
            (i, j, round(s, 6), n)
            for part in pairs
            for i, j, s, n in zip(
                part.items.tolist(),
                part.neighbours.tolist(),
                part.similarities.tolist(),
                part.num_common_users.tolist(),
                strict=True,
            )
        }

    assert rows(parts) == rows([whole])


def test_long_lists_are_sampled_reproducibly_and_counted() -> None:
    users, items = random_log(num_users=60, num_items=120, events=4000)
    config = Swing(max_items_per_user=20, max_users_per_item=10, min_common_users=2, seed=1)
    order = np.random.default_rng(3).permutation(len(users))

    lists = user_lists(users, items, config)
    again = user_lists(users[order], items[order], config)

    distinct = {int(u): len(set(items[users == u].tolist())) for u in np.unique(users)}
    assert lists.num_cut == sum(n > 20 for n in distinct.values()) > 0
    assert lists.lengths.tolist() == [min(n, 20) for n in distinct.values()]
    assert lists.totals_U.tolist() == list(distinct.values())
    assert lists.items_N.tolist() == again.items_N.tolist()
    for user, start, end in zip(
        lists.user_ids_U, lists.offsets[:-1], lists.offsets[1:], strict=True
    ):
        kept = lists.items_N[start:end].tolist()
        assert sorted(set(kept)) == kept
        assert set(kept) <= set(items[users == user].tolist())
    pairs, same = swing_pairs(lists, config), swing_pairs(again, config)
    assert pairs.num_cut_items > 0
    assert pairs.neighbours.tolist() == same.neighbours.tolist()
    assert pairs.num_common_users.max() <= 10
    other = user_lists(users, items, config.model_copy(update={"seed": 2}))
    assert other.items_N.tolist() != lists.items_N.tolist()


def test_no_engagements_give_no_pairs() -> None:
    none = np.empty(0, np.int64)
    lists = user_lists(none, none, Swing())
    assert isinstance(lists, UserLists)
    assert len(swing_pairs(lists, Swing()).items) == 0

"""Every row of an epoch is trained exactly once, whatever happens on the way."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding.epochs import EpochPlan, Leg, Segment, num_rows, num_steps, rows_left, split

groups = st.lists(st.integers(0, 40), min_size=1, max_size=12)
worlds = st.integers(1, 5)


def _rows(plan: EpochPlan, groups: list[int], segments: tuple[Segment, ...]) -> list[int]:
    """Global row numbers of `segments`, in training order."""
    starts = np.concatenate([[0], np.cumsum(groups)])
    rows: list[int] = []
    for segment in segments:
        chunk = [starts[g] + i for g in plan.chunks[segment.chunk] for i in range(groups[g])]
        rows.extend(int(chunk[i]) for i in plan.order(segment))
    return rows


@given(groups=groups, world_size=worlds, seed=st.integers(0, 9), chunk_rows=st.integers(1, 60))
def test_each_row_is_in_exactly_one_share(
    groups: list[int], world_size: int, seed: int, chunk_rows: int
) -> None:
    plan = EpochPlan.shuffled(groups, seed=seed, epoch=3, chunk_rows=chunk_rows)
    shares = split(plan.remaining(()), world_size)
    rows = [row for share in shares for row in _rows(plan, groups, share)]
    assert sorted(rows) == list(range(sum(groups)))
    sizes = [num_rows(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=200)
@given(
    groups=groups,
    seed=st.integers(0, 3),
    legs=st.lists(st.tuples(worlds, st.integers(1, 7), st.integers(0, 6)), max_size=4),
    world_size=worlds,
)
def test_changing_the_world_size_mid_epoch_trains_every_row_once(
    groups: list[int], seed: int, legs: list[tuple[int, int, int]], world_size: int
) -> None:
    plan = EpochPlan.shuffled(groups, seed=seed, epoch=0, chunk_rows=30)
    done: list[Leg] = []
    trained: list[int] = []
    for leg_world, batch, steps in legs:
        shares = split(plan.remaining(done), leg_world)
        for share in shares:
            trained += _rows(plan, groups, share)[: steps * batch]
        done.append(Leg(world_size=leg_world, batch_size_per_rank=batch, steps=steps))
        assert rows_left(sum(groups), done) == num_rows(plan.remaining(done))
    for share in split(plan.remaining(done), world_size):
        trained += _rows(plan, groups, share)
    assert sorted(trained) == list(range(sum(groups)))


@given(groups=groups, world_size=worlds, batch=st.integers(1, 7), data=st.data())
def test_resume_with_the_same_world_size_continues_every_share(
    groups: list[int], world_size: int, batch: int, data: st.DataObject
) -> None:
    plan = EpochPlan.shuffled(groups, seed=1, epoch=0, chunk_rows=30)
    total = num_steps(sum(groups), world_size, batch)
    steps = data.draw(st.integers(0, total))
    before = split(plan.remaining(()), world_size)
    leg = Leg(world_size=world_size, batch_size_per_rank=batch, steps=steps)
    after = split(plan.remaining([leg]), world_size)
    for whole, rest in zip(before, after, strict=True):
        assert _rows(plan, groups, rest) == _rows(plan, groups, whole)[steps * batch :]
    assert num_steps(num_rows(plan.remaining([leg])), world_size, batch) == total - steps


def test_order_depends_on_seed_and_epoch_only() -> None:
    groups = [50, 60, 70, 80]

    def rows(seed: int, epoch: int) -> list[int]:
        plan = EpochPlan.shuffled(groups, seed=seed, epoch=epoch, chunk_rows=100)
        return _rows(plan, groups, plan.remaining(()))

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(1, 1)
    assert rows(1, 0) != rows(2, 0)


def test_shuffle_mixes_rows_of_one_row_group() -> None:
    plan = EpochPlan.shuffled([1000], seed=0, epoch=0)
    rows = np.array(_rows(plan, [1000], plan.remaining(())))
    assert abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.15  # 1/sqrt(1000) = 0.03 expected


def test_sequential_keeps_the_order_of_the_files() -> None:
    groups = [3, 0, 4]
    plan = EpochPlan.sequential(groups)
    assert _rows(plan, groups, plan.remaining(())) == list(range(7))


def test_a_rank_reads_few_chunks_of_others() -> None:
    plan = EpochPlan.shuffled([100] * 40, seed=0, epoch=0, chunk_rows=400)
    shares = split(plan.remaining(()), 4)
    assert sum(len({s.chunk for s in share}) for share in shares) <= len(plan.chunks) + 3

"""Histories against a loop over all pairs of events."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.samples.histories import UserTimeline, history_spans, ragged_positions, retained

# user, timestamp, qualifies: few values each, so that ties and empty histories are frequent.
EVENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), max_size=40).map(
    lambda events: sorted(events, key=lambda e: e[:2])
)


def columns(events: list[tuple[int, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    users, times, flags = (
        np.array([event[i] for event in events], kind)
        for i, kind in enumerate((np.int64, np.int64, np.bool_))
    )
    return users, times, flags


@given(EVENTS, st.integers(1, 5), st.integers(0, 8))
def test_history_is_the_latest_strictly_earlier_events_of_the_user(
    events: list[tuple[int, int, bool]], max_length: int, delay: int
) -> None:
    users, times, flags = columns(events)

    spans = history_spans(UserTimeline.of(users, times), flags, max_length, delay)
    offsets, past = spans.gather(np.arange(len(events)))

    for i, (user, time, _) in enumerate(events):
        earlier = [
            j for j, (u, t, ok) in enumerate(events) if u == user and t + delay < time and ok
        ]
        history = past[offsets[i] : offsets[i + 1]]
        assert history.tolist() == earlier[-max_length:]
        assert (times[history] + delay < time).all()


@given(EVENTS, st.integers(1, 5), st.integers(0, 8))
def test_retained_are_the_latest_qualifying_events_of_each_user_and_those_that_will_enter(
    events: list[tuple[int, int, bool]], max_length: int, entered_before: int
) -> None:
    users, times, flags = columns(events)

    entered = times < entered_before
    kept = retained(UserTimeline.of(users, times), flags, max_length, entered)

    expected: list[int] = []
    for user in set(users.tolist()):
        own = [j for j, (u, _, ok) in enumerate(events) if u == user and ok]
        expected += [j for j in own if events[j][1] < entered_before][-max_length:]
        expected += [j for j in own if events[j][1] >= entered_before]
    assert np.flatnonzero(kept).tolist() == sorted(expected)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4))))
def test_ragged_positions_are_ranges_one_after_the_other(spans: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in spans], np.int64)
    lengths = np.array([length for _, length in spans], np.int64)

    positions, offsets = ragged_positions(starts, lengths)

    assert positions.tolist() == [
        p for start, length in spans for p in range(start, start + length)
    ]
    assert offsets.tolist() == [0, *np.cumsum(lengths).tolist()]

"""Bundles of small tasks, and tasks on a cluster that fail, die and say what they wait for."""

from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from embedding.errors import UserError
from pipeline import tasks
from pipeline.tasks import ROWS_PER_BUNDLE, bundles, stream_results, stream_tasks
from tests.pipeline.cluster_tasks import crash, fault, parts, sleep, times


@given(st.lists(st.integers(0, ROWS_PER_BUNDLE * 2)))
def test_bundles_hold_every_task_once_in_order_and_are_no_larger_than_needed(
    rows: list[int],
) -> None:
    found = bundles(rows)

    assert [i for bundle in found for i in bundle] == list(range(len(rows)))
    for bundle in found:
        assert sum(rows[i] for i in bundle[:-1]) < ROWS_PER_BUNDLE
    for bundle in found[:-1]:
        assert sum(rows[i] for i in bundle) >= ROWS_PER_BUNDLE


@pytest.mark.integration
def test_every_result_comes_once(shared_ray: None, tmp_path: Path) -> None:
    products = stream_tasks(times, range(7), 3, [ROWS_PER_BUNDLE // 2] * 7)
    assert sorted(products) == [0, 3, 6, 9, 12, 15, 18]

    found = sorted(stream_results(parts, range(3), tmp_path))
    assert (tmp_path / "died").exists()
    assert found == [(task, part) for task in range(3) for part in range(3)]


@pytest.mark.integration
def test_a_fault_of_the_user_keeps_its_sentence(shared_ray: None) -> None:
    with pytest.raises(UserError, match=r"^events is not a sound file$"):
        list(stream_tasks(fault, range(4), "events", [1] * 4))


@pytest.mark.integration
def test_a_process_that_always_dies_is_given_up(shared_ray: None, tmp_path: Path) -> None:
    with pytest.raises(ray.exceptions.RayError):
        list(stream_tasks(crash, [0], tmp_path, [1]))
    assert (tmp_path / "crashes").read_text() == "xxx", "once and two retries"


@pytest.mark.integration
def test_silence_is_broken(
    shared_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tasks, "_SILENT_S", 0.5)
    assert list(stream_tasks(sleep, [5], 2.0, [1])) == [5]
    assert "1 tasks at work or waiting for a CPU" in caplog.text

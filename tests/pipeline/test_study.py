"""A study's statistics by hand, and the variants file."""

from pathlib import Path
from typing import Any

import pytest

from embedding.errors import UserError
from pipeline.config import ClusterConfig
from pipeline.study import read_variants, trial_slots
from pipeline.study_statistics import differences, estimates


def test_interval_of_three_seeds_is_students() -> None:
    trials = {0: {"click.auc": 0.1}, 1: {"click.auc": 0.2}, 2: {"click.auc": 0.3}}

    found = estimates(trials)["click.auc"]

    assert found.mean == pytest.approx(0.2)
    # Standard deviation 0.1; 97.5% quantile of t with 2 degrees of freedom: 4.302653.
    assert found.ci95 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found.values == (0.1, 0.2, 0.3)


def test_differences_are_paired_by_seed() -> None:
    first = {0: {"auc": 0.5}, 1: {"auc": 0.7}, 2: {"auc": 0.9}}
    other = {2: {"auc": 0.93}, 0: {"auc": 0.51}}  # seed 1 failed

    found = differences(other, first)["auc"]

    assert found.diff == pytest.approx(0.02)
    # Differences 0.03 and 0.01: standard deviation 0.0141421; t with 1 degree: 12.706205.
    assert found.ci95 == pytest.approx(12.706205 * 0.0141421 / 2**0.5, rel=1e-5)
    assert not found.sure


def test_one_seed_has_no_interval() -> None:
    assert estimates({3: {"auc": 0.6}})["auc"].ci95 is None
    assert differences({3: {"auc": 0.6}}, {3: {"auc": 0.5}})["auc"].ci95 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names to lists"),
        ("a: {b: 1}", "'a' must be a list"),
        ("a/b: []", "'a/b' names a directory"),
        ("a: [", "not valid YAML"),
    ],
)
def test_variants_of_another_shape_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=message):
        read_variants(path)


@pytest.mark.parametrize(
    ("changes", "trials", "per_gpu", "expected"),
    [
        ({}, 99, 1, 16),
        ({"cpus_per_worker": 4}, 99, 1, 4),
        ({"use_gpu": True}, 99, 1, 2),
        ({"use_gpu": True}, 99, 3, 6),
        ({"use_gpu": True, "cpus_per_worker": 4}, 99, 3, 4),
        ({"use_gpu": True}, 5, 3, 5),
        ({"cpus_per_worker": 32}, 99, 1, 1),
    ],
)
def test_trials_side_by_side_are_bound_by_cpus_gpus_and_their_number(
    changes: dict[str, Any], trials: int, per_gpu: int, expected: int
) -> None:
    cluster = ClusterConfig(num_workers=1, **changes)
    assert trial_slots({"CPU": 16.0, "GPU": 2.0}, cluster, trials, per_gpu) == expected

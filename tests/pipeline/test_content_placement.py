"""Wherever the content encoder runs, the same data trains the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.config import ClusterConfig
from pipeline.content.paths import ContentPaths
from pipeline.planning_worker import plan_recipe
from pipeline.train import TrainInputs, TrainJob
from pipeline.worker_group import run_workers
from tests.distributed import run_distributed
from tests.pipeline.content_steps import (
    NUM_STEPS,
    actors_left,
    build_rank,
    difference,
    failed_training,
    one_process,
    recipe,
    train_cases,
    train_cases_of_job,
    write_inputs,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]

TOLERANCE = 1e-5
SERVICE = {
    "kind": "service",
    "timeout_s": 30,
    "cpus_per_actor": 0,
    "transport": "object_store",
}
DIRECT = {**SERVICE, "transport": "direct"}
BOUNDED = {"items": "targets+sample", "sample_share": 0.5, "max_items_per_step": 6}
"""Less than what a rank shows: it draws some of its candidates and of its history items."""
FROZEN: dict[str, Any] = {
    "text": {"lora": None},
    "image": {"lora": None},
    "fusion": {"kind": "concat"},
    "frozen": True,
}
ON_RANKS: dict[str, dict[str, Any]] = {
    "inline": {},
    "one_actor": {"placement": {**SERVICE, "num_actors": 1}},
    "two_actors": {"placement": {**SERVICE, "num_actors": 2}},
    "two_direct": {"placement": {**DIRECT, "num_actors": 2}},
    "stale": {"placement": {**SERVICE, "staleness": 1}},
    "stale_direct": {"placement": {**DIRECT, "num_actors": 2, "staleness": 1}},
    "bounded": {"gradient": BOUNDED},
    "bounded_actors": {"gradient": BOUNDED, "placement": {**SERVICE, "num_actors": 2}},
    "bounded_direct": {"gradient": BOUNDED, "placement": {**DIRECT, "num_actors": 2}},
}


CLUSTER = ClusterConfig(num_workers=2, max_failures=0)


class _Cases(StrictConfig):
    folder: str
    cases: str


def test_every_placement_trains_what_one_process_trains(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with one_process():
        train_cases({"folder": str(tmp_path), "cases": json.dumps({"one_process": {}})})
    job = _Cases(folder=str(tmp_path), cases=json.dumps(ON_RANKS))
    run_workers(train_cases_of_job, job, CLUSTER, tmp_path)
    found = {name: torch.load(tmp_path / f"{name}.pt") for name in ("one_process", *ON_RANKS)}

    expected = found["one_process"]
    assert expected["losses"][-1] < expected["losses"][0]
    for name in ("inline", "one_actor", "two_actors", "two_direct"):
        _assert_same(found[name], expected, name)
    # One step behind, from the second step on: each vector was computed one step ago.
    stale = found["stale"]
    assert stale["losses"][0] == pytest.approx(expected["losses"][0], abs=TOLERANCE)
    assert stale["losses"][5] != pytest.approx(expected["losses"][5], abs=TOLERANCE)
    assert stale["losses"] == pytest.approx(expected["losses"], abs=0.05)
    assert stale["metrics"]["content/bank_age_steps"] == 1
    assert expected["metrics"]["content/bank_age_steps"] == 0
    _assert_same(found["stale_direct"], stale, "stale_direct")
    assert found["stale_direct"]["metrics"]["content/bank_age_steps"] == 1
    assert len(expected["losses"]) == NUM_STEPS
    # Who encodes what was drawn makes no difference to it.
    drawn = found["bounded"]
    for name in ("bounded_actors", "bounded_direct"):
        _assert_same(found[name], drawn, name)
    assert difference(drawn["beside"], expected["beside"]) > 100 * TOLERANCE
    assert 6 < drawn["metrics"]["content/encoded_items"] <= 12
    assert drawn["metrics"]["content/bank_age_steps"] > 0


def test_ranks_train_the_last_layer_of_a_frozen_encoder_as_one_process_does(
    tmp_path: Path,
) -> None:
    write_inputs(tmp_path, **FROZEN)
    with one_process():
        train_cases({"folder": str(tmp_path), "cases": json.dumps({"one_process": FROZEN})})
    job = {"folder": str(tmp_path), "cases": json.dumps({"two_ranks": FROZEN})}
    run_distributed(train_cases, 2, job)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one_process", "two_ranks"))
    _assert_same(two, one, "two ranks")
    assert one["losses"][-1] < one["losses"][0]
    assert one["metrics"]["content/gradient_norm_heads"] > 0
    assert one["metrics"]["content/encoded_items"] == 0


def _assert_same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE), name
    for part in ("tables", "dense", "beside"):
        assert difference(found[part], expected[part]) < TOLERANCE, (name, part)


def test_ranks_and_actors_refuse_towers_other_than_those_of_the_stored_tokens(
    tmp_path: Path,
) -> None:
    write_inputs(tmp_path)
    other = {"text": {"lora": {"rank": 2}, "max_tokens": 8}}
    refusal = r"the text tower 'tiny' of host .* has fingerprint \w+, but the stored tokens come"
    with one_process():
        for placement in ({"kind": "inline"}, SERVICE):
            # The error, which is kept, keeps all that was started for it: actors, too.
            with pytest.raises(UserError, match=refusal) as kept:
                build_rank(recipe(placement=placement, **other), tmp_path)
            assert actors_left() == [], kept


def test_a_service_starts_from_the_moments_that_ranks_would(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    found = []
    with one_process():
        for placement in ({"kind": "inline"}, {**SERVICE, "num_actors": 2}):
            content, _ = build_rank(recipe(placement=placement), tmp_path)
            found.append(content.source.head.layer)
            content.source.close()
    assert not found[0].deviation_H.eq(1).any()
    for name in ("mean_H", "deviation_H"):
        torch.testing.assert_close(*(layer.get_buffer(name) for layer in found))


def test_actors_end_with_a_training_that_fails(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    settings = recipe(placement=SERVICE)
    plan = tmp_path / "plan.json"
    plan.write_text(plan_recipe(settings, 1).model_dump_json())
    job = TrainJob(
        recipe=settings,
        inputs=TrainInputs(
            samples=[tmp_path / "gone.parquet"],
            validation=[],
            plan=tmp_path,
            parent=None,
            content=ContentPaths(index=tmp_path / "index", stores=tmp_path / "stores"),
        ),
        resume=tmp_path / "resume",
    )
    failed = ray.remote(failed_training).options(num_cpus=0).remote(job.model_dump_json())
    said, left = ray.get(failed)
    assert "gone.parquet" in said  # read after the actors have started
    assert left == []

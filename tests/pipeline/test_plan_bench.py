"""The bench of plans: which plans it runs, what it measures, and constants fitted to that."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from deploy.app import main
from embedding.config import RowWiseAdagrad, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.calibration import constants_for
from embedding.planning.cluster_shape import parse_shape
from embedding.planning.plan_description import read_plan
from embedding.planning.workload import table_loads
from pipeline.config import ClusterConfig
from pipeline.planning import bench as plan_bench
from pipeline.planning import bench_command
from pipeline.planning import bench_worker as plan_bench_worker
from pipeline.planning.accuracy import (
    compare,
    fit_ranks,
    measured_plans,
    median_abs_error,
    new_calibration,
    rank_correlation,
)
from pipeline.planning.bench import (
    BenchCase,
    BenchEffort,
    BenchGroup,
    BenchJob,
    BenchReport,
    MeasuredRun,
    case_request,
    run_cases,
)
from pipeline.planning.bench_command import BenchOptions, bench_shape, recipe_case, with_plans
from pipeline.planning.request import RequestChanges
from pipeline.recipe import load_recipe
from tests.embedding.test_calibration import calibration, fit, written
from tests.pipeline.small_log import make_recipe
from tests.pipeline.test_traffic import traffic_of

TWO = parse_shape("cpu:2")
ROWS, DIM, BATCH = 400_000, 32, 256
TABLE_ROWS = {t.name: t.num_embeddings for t in load_recipe("demo").features.tables}


def test_the_chosen_plan_meets_one_of_every_sharding() -> None:
    case = recipe_case(load_recipe("demo"), TWO, BenchOptions())
    names = [plan.proposer for plan in case.plans]
    assert names[0] == "chosen"
    kinds = [{table.sharding for table in plan.tables} for plan in case.plans]
    assert {"row_wise"} in kinds
    assert {"table_wise"} in kinds
    placed = [plan.tables for plan in case.plans]
    assert all(placed.count(tables) == 1 for tables in placed)


def test_every_sharding_has_its_plan_though_a_table_cannot_follow() -> None:
    """A table that is forced to be data-parallel is so in every plan; none is lost or misnamed."""
    recipe = load_recipe("demo", ["features.tables.item.sharding={kind: data_parallel}"])
    case = recipe_case(recipe, parse_shape("cpu:2"), BenchOptions())
    by_name = {plan.proposer: plan for plan in case.plans}
    assert len(by_name) == len(case.plans)
    for sharding in ("data_parallel", "table_wise", "row_wise"):
        plan = by_name.get(f"uniform {sharding}")
        if plan is None:  # it is the chosen one
            plan = by_name["chosen"]
        kinds = {table.table: table.sharding for table in plan.tables}
        assert kinds.pop("item") == "data_parallel"
        assert set(kinds.values()) == {sharding}


def test_plans_of_one_name_are_all_run(tmp_path: Path) -> None:
    (given,) = recipe_case(load_recipe("demo"), TWO, BenchOptions(shortlist=1)).plans
    path = tmp_path / "plan.json"
    path.write_text(given.model_dump_json())
    case = recipe_case(load_recipe("demo"), TWO, BenchOptions(plans=(path, path)))
    assert [plan.proposer for plan in case.plans] == [str(path), str(path)]


def test_sampled_plans_are_run_beside_them() -> None:
    few = recipe_case(load_recipe("demo"), TWO, BenchOptions())
    more = recipe_case(load_recipe("demo"), TWO, BenchOptions(sampled=3))
    assert len(more.plans) == len(few.plans) + 3


def test_a_given_load_replaces_the_recipes() -> None:
    options = BenchOptions(
        exponent=0.5, pooling=("item_id=12.5",), changes=RequestChanges(batch_size_per_rank=64)
    )
    case = recipe_case(load_recipe("demo"), TWO, options)
    assert case.exponent == 0.5
    assert case.batch_size_per_rank == 64
    assert case.traffic is not None
    assert case.traffic.ids_per_sample == {"item_id": 12.5}


def test_a_given_skew_replaces_the_measured_one_and_leaves_the_measured_lengths(
    tmp_path: Path,
) -> None:
    measured = traffic_of(item=TABLE_ROWS["item"]).model_copy(
        update={"ids_per_sample": {"item_id": 3.0}}
    )
    path = tmp_path / "traffic.json"
    path.write_text(measured.model_dump_json())
    changes = RequestChanges(traffic=path)
    used = {}
    for exponent in (None, 0.0):
        options = BenchOptions(exponent=exponent, changes=changes)
        case = recipe_case(load_recipe("demo"), TWO, options)
        (load,) = [
            load
            for load in table_loads(case.features, case.traffic, case.exponent)
            if load.name == "item"
        ]
        assert load.ids_per_sample[0] == 3.0
        used[exponent] = load.ids.share_of_hottest(1.0)
    assert used[None] == 1.0  # the one row that was looked up
    assert used[0.0] == pytest.approx(1 / TABLE_ROWS["item"])


def test_plans_run_and_are_priced_with_the_recipes_precision_on_the_wire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("demo", ["embedding.sharding.communication=fp16"])
    case = recipe_case(recipe, TWO, BenchOptions())
    case = BenchCase.model_validate_json(case.model_dump_json())  # as it reaches a worker
    asked = []
    monkeypatch.setattr(
        plan_bench_worker, "PlanRun", lambda *_, sharding, **__: asked.append(sharding)
    )
    plan_bench_worker._plan_run(case, case.plans[0], [], torch.device("cpu"))
    assert [sharding.communication for sharding in asked] == ["fp16"]
    assert case_request(case, TWO, None).settings.wire_bytes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(exhaustive=True), "--exhaustive: 10 tables on cpu:2 have more than 400"),
        (BenchOptions(pooling=("item_id",)), "write it as feature=12.5"),
        (BenchOptions(pooling=("colour=3",)), "features are .*item_id"),
        (BenchOptions(plans=(Path("none.json"),)), "none.json does not exist"),
    ],
)
def test_what_cannot_be_run_is_said(options: BenchOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_case(load_recipe("demo"), TWO, options)


def test_plans_are_shown_beside_the_constants_that_chose_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the recipe were beside the data sheet's."""
    path = written(tmp_path, calibration(fits=(fit("cpu:2", 1.0),)))
    recipe = load_recipe("demo", [f"embedding.sharding.calibration={path}"])
    case = recipe_case(recipe, TWO, BenchOptions(plans=()))
    run = MeasuredRun(
        case=case.name, plan_index=0, step_s=1.0, halves_s=(1.0, 1.0), phase_s={}, num_steps=9
    )
    monkeypatch.setattr(bench_command, "run_cases", lambda *_, **__: ([run], {}))

    report = bench_command.bench(case, TWO, BenchGroup(recipe.cluster), BenchEffort())

    assert report.constants.startswith("calibration")
    predicted = case.plans[0].predicted
    assert predicted is not None
    assert report.comparisons[0].predicted_s == pytest.approx(predicted.step_s)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--calibrate", "c.json", "--skew", "0", "--no-memory", "--json", "x.json"],
            ["--calibrate measures", "ignore --skew, --no-memory, --json"],
        ),
        (["--calibrate", "c.json", "--plan", "p.json"], ["--calibrate", "ignore --plan;"]),
        (["--calibrate", "c.json", "--calibration", "b.json"], ["ignore --calibration;"]),
        (["--exhaustive", "--shortlist", "3"], ["--exhaustive would ignore --shortlist"]),
        (["--exhaustive", "--sample", "3"], ["--exhaustive would ignore --sample"]),
        (["--shortlist", "3", "--sample", "3"], ["--shortlist would ignore --sample"]),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], messages: list[str]
) -> None:
    assert main(["bench", "plan", *options]) == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


@pytest.mark.parametrize("option", ["--calibrate", "--best", "--json"])
@pytest.mark.parametrize(
    ("target", "why"),
    [("", "it is a directory"), ("gone/x.json", "there is no directory"), ("/proc/x.json", "")],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, target: str, why: str
) -> None:
    path = tmp_path / target
    assert main(["bench", "plan", option, str(path)]) == 2
    assert f"{path} cannot be written" in (said := capsys.readouterr().err)
    assert why in said


def test_a_result_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk left half of a new file in the place of the old one."""
    path = tmp_path / "plan.json"
    command = ["plan", "--recipe", "demo", "--topology", "cpu:2", "--json", str(path)]
    assert main(command) == 0
    before = path.read_text()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([*command, "--constraint", "item=row_wise"]) != 0
    assert path.read_text() == before


@pytest.mark.parametrize("options", [[], ["--calibrate", "calibration.json"]])
def test_ranks_of_a_cluster_need_a_directory_in_common(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
) -> None:
    """Those on other hosts wrote into a temporary directory that the driver never saw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")

    assert main(["bench", "plan", *options]) == 2

    assert "RAY_ADDRESS=192.0.2.1:6379" in (said := capsys.readouterr().err)
    assert "give --scratch DIR, on storage that every node mounts" in said
    assert main(["bench", "plan", *options, "--scratch", "here"]) == 2
    assert "--scratch=here is relative" in capsys.readouterr().err


def test_ranks_write_below_the_given_directory_and_leave_nothing_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[tuple[Path, Path]] = []

    def run(worker: object, job: BenchJob, cluster: ClusterConfig, scratch: Path) -> None:
        used.append((scratch, job.output))
        (job.output / "results.jsonl").touch()

    monkeypatch.setattr(plan_bench, "run_workers", run)
    monkeypatch.chdir(tmp_path)
    group = BenchGroup(ClusterConfig(num_workers=2), Path("shared", "new"))

    for _ in range(2):
        assert run_cases([], group, BenchEffort()) == ([], {})

    (first, output), (second, _) = used
    assert first == output
    assert first.is_absolute()
    assert first != second
    assert first.parent == second.parent == tmp_path / "shared" / "new"
    assert list((tmp_path / "shared" / "new").iterdir()) == []


def test_ranks_must_fill_the_clusters_hosts() -> None:
    present = parse_shape("h100:2x8")
    assert bench_shape(present, 4).name == "h100:4"
    assert bench_shape(present, 16).name == "h100:2x8"
    for ranks in (12, 32):
        with pytest.raises(UserError, match="use at most 8 ranks, or whole hosts"):
            bench_shape(present, ranks)


def two_tables() -> BenchCase:
    tables = (
        TableConfig(name="large", num_embeddings=ROWS, embedding_dim=DIM),
        TableConfig(name="small", num_embeddings=1000, embedding_dim=DIM),
    )
    sparse = (
        SparseFeature(name="l", table="large", max_length=5),
        SparseFeature(name="s", table="small"),
    )
    return BenchCase(
        name="two",
        features=FeatureSchema(tables=tables, sparse=sparse),
        exponent=1.0,
        batch_size_per_rank=BATCH,
        optimizer=RowWiseAdagrad(),
        plans=(),
    )


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_measured_plans_fit_constants_that_predict_them(tmp_path: Path) -> None:
    case = with_plans(two_tables(), TWO, 5, seed=0)
    seen: list[tuple[int, int]] = []
    effort = BenchEffort(rounds=2, steps_per_round=4, memory_steps=2)
    runs, parts = run_cases(
        [case],
        BenchGroup(ClusterConfig(num_workers=2)),
        effort,
        time_parts=True,
        progress=lambda done, total: seen.append((done, total)),
    )

    assert [run.plan_index for run in runs] == list(range(5))
    assert all(total == 10 for _, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for run, plan in zip(runs, case.plans, strict=True):
        assert run.step_s > 0
        assert run.num_steps == 8
        # Of two rounds of four steps, the median of all lies between theirs.
        assert min(run.halves_s) <= run.step_s <= max(run.halves_s)
        assert set(run.phase_s) >= {"lookup", "backward"}
        # Weights and one accumulator a row must be in memory; gradients and buffers come on top.
        for peak, weights in zip(run.peak_bytes, plan.weight_bytes_per_rank(), strict=True):
            assert peak > weights
            assert peak < 2 * weights + (64 << 20)
    assert all(seconds >= 0 for seconds in parts.values())

    fit = fit_ranks(measured_plans([case], runs, TWO), TWO, parts)
    path = tmp_path / "calibration.json"
    path.write_text(new_calibration(TWO, None, [fit]).model_dump_json())
    assert constants_for(TWO, path).source.startswith("calibration of 2 ranks")
    after, before = compare([case], runs, TWO, path), compare([case], runs, TWO, None)
    measured = [entry.measured_s for entry in after]
    error = median_abs_error(measured, [entry.predicted_s for entry in after])
    assert error == pytest.approx(fit.median_abs_error, abs=1e-6)
    assert error < median_abs_error(measured, [entry.predicted_s for entry in before])


@pytest.mark.integration
@pytest.mark.usefixtures("one_process")
def test_the_command_shows_measured_beside_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path).model_dump(mode="json")
    recipe["cluster"]["num_workers"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    command = ["bench", "plan", "--recipe", str(tmp_path / "small.yaml"), "--quick", "--no-memory"]
    path = tmp_path / "bench.json"
    assert main([*command, "--json", str(path)]) == 0
    report = BenchReport.model_validate_json(path.read_text())
    assert report.topology == "cpu:1"
    assert report.constants == "data sheet"
    assert {entry.name for entry in report.comparisons} >= {"chosen"}
    shown = capsys.readouterr().out
    for entry in report.comparisons:
        assert entry.measured_s > 0
        assert entry.predicted_s > 0
        assert entry.name in shown
    assert main([*command, "--shortlist", "2", "--best", str(tmp_path / "best.json")]) == 0
    best = read_plan(tmp_path / "best.json")
    assert best.proposer in ("shortlist 1", "shortlist 2")
    assert best.proposer in capsys.readouterr().out
    assert main([*command, "--ranks", "1", "--ranks", "2"]) == 2
    assert "--calibrate only" in capsys.readouterr().err


def test_figures_of_accuracy() -> None:
    assert median_abs_error([1.0, 2.0, 4.0], [1.1, 1.0, 4.0]) == pytest.approx(0.1)
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = rank_correlation([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    assert tied == pytest.approx(4.5 / 22.5**0.5)
    assert rank_correlation([1.0, 2.0], [3.0, 3.0]) == rank_correlation([1.0], [1.0]) == 0.0
    rng = np.random.default_rng(0)
    noise = [float(x) for x in rng.random(200)]
    assert abs(rank_correlation(noise, noise[::-1])) < 0.2

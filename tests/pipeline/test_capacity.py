"""Capacity: a point against its plan, growth against planning, and what a sweep is made of."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from embedding.config import ManagedCollision, RowWiseAdagrad, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.cluster_shape import ClusterShape, find_machine, parse_shape
from embedding.planning.cost import RESERVED_SHARE, SLACK_SHARE
from embedding.planning.cost_constants import data_sheet_constants
from embedding.planning.demand import StepSettings
from embedding.planning.id_distribution import IdDistribution, zipf
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.traffic import TableTraffic, Traffic
from pipeline.capacity.answer import answer_of, choose
from pipeline.capacity.dense_cost import dense_cost
from pipeline.capacity.evaluate import _costs_of, _keys, _with_costs, evaluate_point
from pipeline.capacity.growth import breaking_growth, grown
from pipeline.capacity.step import dense_seconds
from pipeline.capacity.sweep import SweepOptions, expand, sweep_request
from pipeline.capacity.types import (
    GPU_FLOPS_SHARE,
    CapacityRequest,
    DenseCost,
    PointKey,
    Target,
)
from pipeline.planning.request import plan_request, with_traffic
from pipeline.planning.reserve import Reserve, reserve_of
from pipeline.recipe import load_recipe
from tests.embedding.test_calibration import calibration

MIB = 1 << 20
TERABYTE = str(Path(__file__).parents[2] / "benchmarks" / "terabyte.yaml")
DENSE = DenseCost(flops_per_row=2e6, parameters=10**6, cpu_seconds_per_row=1e-4, precision="fp32")


def small_gpus(hbm_bytes: int, price_per_hour: float | None = None) -> ClusterShape:
    machine = find_machine("h100").model_copy(
        update={
            "hbm_bytes": hbm_bytes,
            "host_bytes": 8 * hbm_bytes,
            "price_per_hour": price_per_hour,
        }
    )
    return ClusterShape(machine=machine, ranks_per_host=2)


def request_of(shapes: tuple[ClusterShape, ...], **changes: object) -> CapacityRequest:
    request = CapacityRequest(
        recipe=load_recipe("demo"), shapes=shapes, batch_sizes=(512,), dense={1.0: DENSE}
    )
    return request.model_copy(update=changes)


def key_of(shape: ClusterShape, growth: float = 1.0, dim_factor: float = 1.0) -> PointKey:
    return PointKey(shape=shape, batch_size_per_rank=512, growth=growth, dim_factor=dim_factor)


def test_a_point_says_what_its_plan_and_the_dense_side_take() -> None:
    shape = parse_shape("h100:8")
    point = evaluate_point(request_of((shape,)), key_of(shape))
    plan = plan_tables(plan_request(load_recipe("demo"), shape))
    assert plan.predicted is not None
    assert point.sparse_s == pytest.approx(plan.predicted.step_s)
    flops = 2e6 * 512 / (GPU_FLOPS_SHARE * 67e12)
    ring = 2 * 7 / 8 * 4e6 / 450e9
    assert point.dense_s == pytest.approx(flops + max(0.0, ring - 2 / 3 * flops))
    ahead = plan.predicted.phase_s["input_dist"]
    assert point.step_s == pytest.approx(point.sparse_s + point.dense_s - min(ahead, point.dense_s))
    assert point.rows_per_s == pytest.approx(8 * 512 / point.step_s)
    tables = load_recipe("demo").features.tables
    assert point.table_bytes == sum(4 * t.num_embeddings * t.embedding_dim for t in tables)
    free = 80 * 1024 * MIB * (1 - RESERVED_SHARE) - plan.predicted.peak_bytes
    assert point.headroom == pytest.approx(free / (80 * 1024 * MIB))


def test_the_fuller_of_rank_and_host_leaves_the_headroom() -> None:
    """80 GiB of a GPU and 64 MiB of its host, which holds a copy of all tables; CPUs have one."""
    machine = find_machine("h100").model_copy(update={"host_bytes": 64 * MIB})
    shape = ClusterShape(machine=machine, ranks_per_host=2)
    point = evaluate_point(request_of((shape,)), key_of(shape))
    assert point.refusal is None
    assert point.host_bytes is not None
    assert point.host_bytes > point.table_bytes
    free = 0.85 - point.host_bytes / (64 * MIB)
    assert point.headroom == pytest.approx(free) == pytest.approx(point.host_headroom)
    assert 1 - (point.peak_bytes or 0) / (point.device_bytes or 1) > 0.8
    cpu = parse_shape("cpu:2")
    assert evaluate_point(request_of((cpu,)), key_of(cpu)).host_headroom is None


def test_a_dense_side_that_needs_more_than_the_reserve_takes_room_from_tables() -> None:
    """A sweep of batch sizes planned tables into the memory of its activations."""
    shape, held = small_gpus(64 * MIB), 40_000.0
    wide = DENSE.model_copy(update={"activation_bytes_per_row": held})
    request = request_of((shape,), kernels=("fused",))
    little = evaluate_point(request, key_of(shape))
    much = evaluate_point(request.model_copy(update={"dense": {1.0: wide}}), key_of(shape))
    assert (much.peak_bytes or 0) - (little.peak_bytes or 0) == pytest.approx(512 * held, abs=1)
    assert (much.breaks_at_growth or 0) < (little.breaks_at_growth or 0)
    large = key_of(shape).model_copy(update={"batch_size_per_rank": 4096})
    refused = evaluate_point(request.model_copy(update={"dense": {1.0: wide}}), large)
    assert refused.refusal is not None
    assert "what is no table takes" in refused.refusal
    assert "use fewer rows a rank" in refused.refusal


def test_a_small_dense_side_has_the_share_that_plans_keep_free() -> None:
    planned = plan_request(load_recipe("demo"), parse_shape("h100:8"))
    whole = planned.shape.device_bytes
    # A value, two gradients, two moments: 20 MB of 80 GiB.
    assert reserve_of(planned, None, DENSE) == Reserve(RESERVED_SHARE * whole, 12e6)
    more = DENSE.model_copy(update={"parameters": 10**9, "is_averaged": True})
    assert reserve_of(planned, None, more) == Reserve(SLACK_SHARE * whole + 24e9, 16e9)


def test_copies_for_checkpoints_are_in_the_memory_of_cpu_ranks_or_of_gpus_hosts() -> None:
    cpu, gpu = parse_shape("cpu:2"), parse_shape("h100:2")
    more = DENSE.model_copy(update={"parameters": 2 * 10**6})
    (on_cpu, more_on_cpu), (on_gpu, more_on_gpu) = (
        [
            evaluate_point(request_of((shape,), dense={1.0: dense}), key_of(shape))
            for dense in (DENSE, more)
        ]
        for shape in (cpu, gpu)
    )
    assert (more_on_cpu.peak_bytes or 0) - (on_cpu.peak_bytes or 0) == pytest.approx(12e6, abs=1)
    assert (more_on_gpu.host_bytes or 0) - (on_gpu.host_bytes or 0) == pytest.approx(12e6, abs=1)
    assert more_on_gpu.peak_bytes == on_gpu.peak_bytes


def test_what_a_row_keeps_for_backward_is_counted() -> None:
    """At least the inputs and outputs of a wide layer, in float32."""
    narrow, wide = (
        dense_cost(load_recipe("demo", [f"ranking.model.classifier.hidden={hidden}"]), None)
        for hidden in ("[64]", "[64, 1024]")
    )
    more = wide.activation_bytes_per_row - narrow.activation_bytes_per_row
    assert narrow.activation_bytes_per_row > 0
    assert more >= 4 * 1024
    averaged = dense_cost(load_recipe("demo", ["ranking.trainer.ema_decay=0.9"]), None)
    assert (narrow.is_averaged, averaged.is_averaged) == (False, True)


def test_a_history_s_attention_counts_as_dense_work() -> None:
    """Of a two-layer HSTU of width 32: at least its square projections of every token."""
    hstu = "ranking.model.interests=[{kind: hstu, history: clicks, gap: clicks_gap}]"
    without, with_hstu = (
        dense_cost(load_recipe("demo", [override]), None)
        for override in ("ranking.model.interests=[]", hstu)
    )
    history = next(h for h in load_recipe("demo").features.histories if h.name == "clicks")
    projections = 2 * (32 * 4 * 32 + 32 * 32) * (history.max_length + 1)
    forward_and_backward = 3 * 2
    more = with_hstu.flops_per_row - without.flops_per_row
    assert more > forward_and_backward * projections
    assert with_hstu.parameters - without.parameters > 2 * (32 * 4 * 32 + 32 * 32)


def test_other_products_a_row_leave_the_parameters_to_be_added_up() -> None:
    """As many as the recipe's ranker has; a CPU is as fast as it was measured to be."""
    request = sweep_request(load_recipe("demo"), SweepOptions(("h100:8",), dense_flops_per_row=8e6))
    assert request.dense_flops_per_row == 8e6
    counted = request.model_copy(update={"dense": {1.0: DENSE}})
    dense = _with_costs(counted).dense[1.0]
    assert (dense.flops_per_row, dense.parameters) == (8e6, DENSE.parameters)
    assert dense.cpu_seconds_per_row == pytest.approx(4 * DENSE.cpu_seconds_per_row)
    nothing = DENSE.with_flops(0.0)
    ring = 2 * 7 / 8 * 4e6 / 450e9
    assert dense_seconds(nothing, parse_shape("h100:8"), 512) == pytest.approx(ring)


def test_factors_scale_rows_and_dims() -> None:
    shape = parse_shape("h100:8")
    request = request_of((shape,), dense={1.0: DENSE, 2.0: DENSE})
    one = evaluate_point(request, key_of(shape)).table_bytes
    assert evaluate_point(request, key_of(shape, growth=3.0)).table_bytes == pytest.approx(3 * one)
    assert evaluate_point(request, key_of(shape, dim_factor=2.0)).table_bytes == 2 * one


def test_wider_tables_have_a_dense_side_of_their_own() -> None:
    shape = parse_shape("h100:1")
    wide = DENSE.model_copy(update={"flops_per_row": 3 * DENSE.flops_per_row})
    request = request_of((shape,), dense={1.0: DENSE, 2.0: wide})
    now, wider = (evaluate_point(request, key_of(shape, dim_factor=f)) for f in (1.0, 2.0))
    assert now.dense_s is not None
    assert wider.dense_s == pytest.approx(3 * now.dense_s)


def test_the_dense_side_is_counted_for_every_width() -> None:
    recipe = load_recipe("demo")
    twice = [f"features.tables.{t.name}.embedding_dim={2 * t.embedding_dim}"
             for t in recipe.features.tables]  # fmt: skip
    by_hand = dense_cost(load_recipe("demo", twice), None)
    request = request_of((parse_shape("h100:1"),), dim_factors=(1.0, 2.0))
    found = CapacityRequest.model_validate_json(_costs_of(request.model_dump_json()))
    assert found.dense[1.0] == DENSE
    assert found.dense[2.0].flops_per_row == by_hand.flops_per_row
    assert found.dense[2.0].parameters == by_hand.parameters
    now = dense_cost(recipe, None)
    assert by_hand.flops_per_row > now.flops_per_row
    assert by_hand.parameters > now.parameters


def test_what_fits_nowhere_is_a_point_with_the_reason() -> None:
    shape = small_gpus(64 * MIB)
    point = evaluate_point(request_of((shape,)), key_of(shape, growth=1000.0))
    assert point.refusal is not None
    assert "short" in point.refusal
    assert point.rows_per_s is None


@pytest.mark.parametrize("kernels", [("fused",), ("fused", "fused_uvm", "fused_uvm_caching")])
def test_tables_grow_until_planning_refuses(kernels: tuple[str, ...]) -> None:
    shape = small_gpus(64 * MIB)
    request = replace(plan_request(load_recipe("demo"), shape), kernels=kernels)
    growth, why = breaking_growth(request)
    assert growth is not None
    assert growth > 1
    assert why is not None
    assert "short" in why or "evenly" in why
    plan_tables(grown(request, growth))
    with pytest.raises(UserError):
        plan_tables(grown(request, 1.1 * growth))


def test_rows_that_a_sharding_cannot_cut_end_the_growth_with_its_reason() -> None:
    table = TableConfig(name="t", num_embeddings=17, embedding_dim=8, ids=ManagedCollision())
    request = PlanRequest(
        schema=FeatureSchema(tables=(table,), sparse=(SparseFeature(name="f", table="t"),)),
        shape=parse_shape("h100:8"),
        settings=StepSettings(64, RowWiseAdagrad()),
    )
    growth, why = breaking_growth(request)
    assert growth == 1
    assert why is not None
    assert "cuts its 17 rows into 8 blocks of 3" in why


def test_more_kernels_make_no_plan_slower_where_memory_is_tight() -> None:
    """2 TB of tables fill 64 GPUs of 40 GB nearly: few of them go to host memory, not all."""
    request = grown(plan_request(load_recipe(TERABYTE), parse_shape("a100-40:8x8")), 2.0)
    every, cached = (
        plan_tables(replace(request, kernels=kernels))
        for kernels in (("fused", "fused_uvm", "fused_uvm_caching"), ("fused", "fused_uvm_caching"))
    )
    assert every.predicted is not None
    assert cached.predicted is not None
    assert every.predicted.step_s <= 1.1 * cached.predicted.step_s
    assert sum(table.kernel != "fused" for table in every.tables) < 10


def test_days_left_follow_the_measured_growth() -> None:
    shape = small_gpus(64 * MIB)
    request = request_of((shape,), growth_per_day=0.01)
    point = evaluate_point(request, key_of(shape))
    assert point.breaks_at_growth is not None
    assert point.days_left == pytest.approx((point.breaks_at_growth - 1) / 0.01)


def test_days_of_grown_tables_are_counted_in_todays_rows() -> None:
    """Tables of 3 N rows that may become 3 b N gain .01 N rows a day."""
    shape = small_gpus(64 * MIB)
    request = request_of((shape,), growth_per_day=0.01)
    point = evaluate_point(request, key_of(shape, growth=3.0))
    assert point.breaks_at_growth is not None
    assert point.days_left == pytest.approx(3 * (point.breaks_at_growth - 1) / 0.01)


def measured_growth(rows_per_day: float | None, days: int = 14) -> Traffic:
    """Traffic of the demo recipe whose tables all gain so many rows a day."""
    tables = load_recipe("demo").features.tables
    return Traffic(
        rows=100,
        rows_per_day=100,
        days=days,
        tables=tuple(
            TableTraffic(
                table=table.name,
                num_rows=table.num_embeddings,
                lookups=100,
                rows_touched=100 if table.name == "item" else 400,
                rows_seen_once=100,
                bin_rows=(100.0,),
                bin_shares=(1.0,),
                new_rows_per_day=rows_per_day,
            )
            for table in tables
        ),
    )


@pytest.mark.parametrize("growth", [1.0, 3.0])
def test_given_growth_is_counted_before_the_measured_one(tmp_path: Path, growth: float) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(measured_growth(5.0).model_dump_json())
    shape, recipe = small_gpus(64 * MIB), with_traffic(load_recipe("demo"), path)
    measured, given, none = (
        evaluate_point(
            request_of((shape,), recipe=recipe, growth_per_day=rate), key_of(shape, growth=growth)
        )
        for rate in (None, 0.01, 0.0)
    )
    assert measured.breaks_at_growth is not None
    more = growth * (measured.breaks_at_growth - 1)
    tables = load_recipe("demo").features.tables
    elements = {t.name: t.num_embeddings * t.embedding_dim for t in tables}
    # Of the rows in use, not of those that tables have: the item table's become 5% more a day.
    gained = sum(n * (0.05 if name == "item" else 0.0125) for name, n in elements.items())
    assert measured.days_left == pytest.approx(more * sum(elements.values()) / gained, rel=1e-3)
    assert given.days_left == pytest.approx(more / 0.01)
    assert none.days_left is None


def test_two_days_of_traffic_say_nothing_of_how_long_a_cluster_lasts(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(measured_growth(None, days=2).model_dump_json())
    shape, recipe = small_gpus(64 * MIB), with_traffic(load_recipe("demo"), path)
    unknown, given = (
        evaluate_point(request_of((shape,), recipe=recipe, growth_per_day=rate), key_of(shape))
        for rate in (None, 0.01)
    )
    assert (unknown.days_left, unknown.traffic_days) == (None, 2)
    assert "in how many days is not known: traffic of 2 of at least 14" in answer_of(
        (unknown,), unknown, Target()
    )
    assert given.traffic_days is None
    assert "is not known" not in answer_of((given,), given, Target())


def test_grown_tables_are_looked_up_with_the_same_skew() -> None:
    ids = zipf(1000, 1.2)
    table = TableConfig(name="t", num_embeddings=1000, embedding_dim=8)
    measured = TableTraffic(
        table="t",
        num_rows=1000,
        lookups=5000,
        rows_touched=1000,
        rows_seen_once=10,
        bin_rows=ids.num_rows,
        bin_shares=ids.mass,
    )
    request = PlanRequest(
        schema=FeatureSchema(tables=(table,), sparse=(SparseFeature(name="f", table="t"),)),
        shape=parse_shape("cpu:2"),
        settings=StepSettings(64, RowWiseAdagrad()),
        traffic=Traffic(rows=5000, rows_per_day=5000, tables=(measured,)),
    )
    after = grown(request, 4.0)
    assert after.schema.tables[0].num_embeddings == 4000
    assert after.traffic is not None
    spread = IdDistribution(after.traffic.tables[0].bin_rows, after.traffic.tables[0].bin_shares)
    for rows in (1, 10, 500):
        assert spread.share_of_hottest(4 * rows) == pytest.approx(ids.share_of_hottest(rows))


def test_dense_side_on_cpu_is_the_measured_time() -> None:
    assert dense_seconds(DENSE, parse_shape("cpu:1"), 100) == pytest.approx(100 * 1e-4)


def test_more_cpu_ranks_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alone = DENSE.model_copy(update={"parameters": 0})
    for topology, turns in (("cpu:1", 1), ("cpu:2", 1), ("cpu:5", 2.5), ("cpu:2x4", 2)):
        seconds = dense_seconds(alone, parse_shape(topology), 100)
        assert seconds == pytest.approx(turns * 100 * 1e-4), topology
    assert data_sheet_constants(parse_shape("cpu:5")).cores_per_host == 2
    assert parse_shape("h100:8").ranks_per_core == 1


def test_between_hosts_the_ring_is_as_fast_as_all_network_cards() -> None:
    idle = DENSE.model_copy(update={"flops_per_row": 0.0})
    ring = 2 * 15 / 16 * 4e6
    assert dense_seconds(idle, parse_shape("h100:2x8"), 1) == pytest.approx(ring / (8 * 50e9))
    ring = 2 * 3 / 4 * 4e6
    assert dense_seconds(idle, parse_shape("h100:4x1"), 1) == pytest.approx(ring / 50e9)


@pytest.mark.parametrize("options", [{"growth": (2.0,)}, {"dims": (0.5, 1.0, 0.5)}])
def test_today_is_always_in_the_sweep(options: dict[str, tuple[float, ...]]) -> None:
    request = sweep_request(load_recipe("demo"), SweepOptions(("h100:8",), **options))
    request = request.model_copy(update={"dense": dict.fromkeys(request.dim_factors, DENSE)})
    points = [evaluate_point(request, key) for key in _keys(request)]
    assert len(points) == 2
    chosen = choose(points, Target())
    assert chosen is not None
    assert (chosen.growth, chosen.dim_factor) == (1.0, 1.0)
    assert "h100:8 trains" in answer_of(points, chosen, Target())


def test_ranges_double() -> None:
    assert [shape.name for shape in expand("h200:1..6x8")] == [
        "h200:8",
        "h200:2x8",
        "h200:4x8",
        "h200:6x8",
    ]
    assert [shape.name for shape in expand("cpu:1..4")] == ["cpu:1", "cpu:2", "cpu:4"]


def test_clusters_of_a_files_hosts_are_swept_with_the_calibration_of_its_base(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("base: h200\nranks: 8\nhbm_bytes: 64e9\n")
    made = calibration_file(tmp_path / "calibration.json", "h200")
    options = SweepOptions((f"{path}:1..4x8",), calibrations=(made,), prices=("ours=60",))
    request = sweep_request(load_recipe("demo"), options)
    assert [shape.name for shape in request.shapes] == [f"{path}:{n}8" for n in ("", "2x", "4x")]
    assert [shape.price_per_hour for shape in request.shapes] == [60, 120, 240]
    point = evaluate_point(request_of(request.shapes, calibrations=(made,)),
                           key_of(request.shapes[1]))  # fmt: skip
    assert point.topology == f"{path}:2x8"
    assert point.constants is not None
    assert point.constants.startswith("calibration of 8 ranks on NVIDIA H200")
    path.write_text("base: h200\nranks: 8\nhbm_bandwidth: 1e12\n")
    with pytest.raises(UserError, match="changes of h200: hbm_bandwidth"):
        sweep_request(load_recipe("demo"), options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SweepOptions(("h200:4..2x8",)), "a range goes from at least 1 upwards"),
        (SweepOptions(("h20:8",)), "did you mean 'h200'"),
        (SweepOptions(("h200:8",), prices=("h200",)), "write it as h200=80"),
        (SweepOptions(("h200:8",), prices=("h200=-1",)), "write it as h200=80"),
        (SweepOptions(("h200:8",), prices=("h20=3",)), "did you mean 'h200'"),
        (SweepOptions(("h200:8",), calibrations=(Path("none.json"),)), "none.json does not exist"),
        (SweepOptions(("h200:8",), traffic=Path("none.json")), "none.json does not exist"),
        (SweepOptions(("h200:8",), growth=(0.0,)), "growth: Input .* than 0; got 0.0"),
    ],
)
def test_what_cannot_be_swept_is_said(options: SweepOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_request(load_recipe("demo"), options)


def test_a_given_traffic_is_used_and_that_of_another_recipe_ends_the_study(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(measured_growth(5.0).model_dump_json())
    options = SweepOptions(("h200:8",), traffic=path)
    assert sweep_request(load_recipe("demo"), options).recipe.embedding.sharding.traffic == path
    larger = load_recipe("demo", ["features.tables.item.num_embeddings=9001"])
    with pytest.raises(UserError, match="'item' had .* rows when it was measured and has 9001 now"):
        sweep_request(larger, options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("embedding.sharding.communication=bf16", "bf16 is not supported by gloo on CPU; use"),
        ("embedding.optimizer={kind: adam}", "'adam' has a fused kernel for CUDA only"),
    ],
)
def test_what_cannot_run_on_a_machine_of_the_sweep_ends_the_study(
    setting: str, message: str
) -> None:
    recipe = load_recipe("demo", ["cluster.use_gpu=true", setting])
    sweep_request(recipe, SweepOptions(("h100:8",)))
    with pytest.raises(UserError, match=rf"topology cpu:2: .*{message}.*leave topologies of cpu"):
        sweep_request(recipe, SweepOptions(("h100:8", "cpu:2", "cpu:4")))


@pytest.mark.parametrize(
    ("machine", "versions", "message"),
    [
        ("cpu", {}, "is of 'cpu', which no topology of the sweep has .h200."),
        ("h200", {"torchrec": "0.1"}, "made with torchrec 0.1"),
    ],
)
def test_a_calibration_that_does_not_hold_ends_the_study(
    tmp_path: Path, machine: str, versions: dict[str, str], message: str
) -> None:
    path = tmp_path / "calibration.json"
    made = calibration(machine, versions=versions)
    path.write_text(made.model_dump_json())
    with pytest.raises(UserError, match=message):
        sweep_request(load_recipe("demo"), SweepOptions(("h200:8",), calibrations=(path,)))


def calibration_file(path: Path, machine: str, **changes: object) -> Path:
    made = calibration(machine, device_name=f"NVIDIA {machine.upper()}", **changes)
    path.write_text(made.model_dump_json())
    return path


def test_the_recipes_calibration_is_used_for_its_machine(tmp_path: Path) -> None:
    own = calibration_file(tmp_path / "own.json", "h200")
    recipe = load_recipe("demo", [f"embedding.sharding.calibration={own}"])
    request = sweep_request(recipe, SweepOptions(("h200:2", "h100:2")))
    request = request.model_copy(update={"dense": {1.0: DENSE}})
    there, elsewhere = (evaluate_point(request, key).constants for key in _keys(request))
    assert there is not None
    assert there.startswith("calibration of 2 ranks on NVIDIA H200")
    assert elsewhere == "data sheet"

    made = calibration("h200", device_name="Another H200")
    (tmp_path / "given.json").write_text(made.model_dump_json())
    given = request.model_copy(update={"calibrations": (tmp_path / "given.json",)})
    constants = evaluate_point(given, key_of(parse_shape("h200:2"))).constants
    assert constants is not None
    assert "on Another H200" in constants


def test_a_stale_calibration_of_the_recipe_ends_the_study_where_it_would_be_used(
    tmp_path: Path,
) -> None:
    own = calibration_file(tmp_path / "own.json", "h200", versions={"torchrec": "0.1"})
    recipe = load_recipe("demo", [f"embedding.sharding.calibration={own}"])
    sweep_request(recipe, SweepOptions(("h100:8",)))
    with pytest.raises(UserError, match="made with torchrec 0.1"):
        sweep_request(recipe, SweepOptions(("h100:8", "h200:8")))

"""The answer of a capacity study: which cluster, in which words, table and report."""

import io
from pathlib import Path

from rich.console import Console

from embedding.planning.cluster_shape import parse_shape
from pipeline.capacity.answer import answer_of, choose
from pipeline.capacity.report import (
    best_batches,
    plan_line,
    points_table,
    write_capacity_report,
)
from pipeline.capacity.sweep import SweepOptions, sweep_request
from pipeline.capacity.types import CapacityAnswer, CapacityPoint, DenseCost, Target
from pipeline.recipe import load_recipe

DENSE = DenseCost(flops_per_row=2e6, parameters=10**6, cpu_seconds_per_row=1e-4, precision="fp32")


def point_of(topology: str, rows_per_s: float, **changes: object) -> CapacityPoint:
    shape = parse_shape(topology)
    point = CapacityPoint(
        topology=topology,
        machine=shape.machine.name,
        world_size=shape.world_size,
        num_hosts=shape.num_hosts,
        batch_size_per_rank=1024,
        growth=1.0,
        dim_factor=1.0,
        table_bytes=1000,
        constants="data sheet",
        shardings={"row_wise fused": 1},
        step_s=1024 * shape.world_size / rows_per_s,
        sparse_s=0.0,
        dense_s=0.0,
        hidden_s=0.0,
        rows_per_s=rows_per_s,
        peak_bytes=30,
        device_bytes=100,
        headroom=0.7,
        binding="a limit",
        breaks_first="a table is short",
        breaks_at_growth=3.0,
    )
    return point.model_copy(update=changes)


def test_the_smallest_cluster_that_is_fast_enough_is_chosen() -> None:
    points = (point_of("h100:1", 1e6), point_of("h100:2", 2e6), point_of("h100:8", 7e6))
    assert choose(points, Target(rows_per_s=1.5e6)) == points[1]
    assert choose(points, Target(rows_per_day=3600e6 * 4, window_hours=2)) == points[1]
    assert choose(points, Target(rows_per_s=8e6)) is None


def test_prices_decide_where_they_are_given() -> None:
    cheap = point_of("h100:8", 5e6, price_per_hour=10.0, cost_per_billion_rows=0.6)
    dear = point_of("h200:4", 5e6, price_per_hour=90.0, cost_per_billion_rows=5.0)
    assert choose((dear, cheap), Target(rows_per_s=1e6)) == cheap
    assert choose((dear, cheap), Target()) == cheap
    said = answer_of((dear, cheap), cheap, Target(rows_per_s=1e6))
    assert "h100:8 is the cheapest cluster" in said
    assert "A billion rows cost 0.60" in said
    assert "no price" not in said


def test_what_has_no_price_is_named_and_nothing_is_called_cheaper_than_it() -> None:
    priced = point_of("h100:8", 5e6, price_per_hour=80.0, cost_per_billion_rows=4.4)
    points = (priced, point_of("l40s:4", 5e6), point_of("v100:8", 5e6), point_of("l40s:8", 9e6))
    for target, lead in (
        (Target(rows_per_s=1e6), "the cheapest of the clusters with a price that reaches 1M rows"),
        (Target(), "trains the cheapest rows of the clusters with a price"),
    ):
        chosen = choose(points, target)
        assert chosen == priced
        said = answer_of(points, chosen, target)
        assert lead in said
        assert "l40s, v100 have no price and could be cheaper" in said
    # A price and a number of ranks are not compared either.
    tight = priced.model_copy(update={"headroom": 0.0})
    said = answer_of((tight, points[1]), points[1], Target(rows_per_s=1e6))
    assert "l40s:4 is the smallest cluster" in said
    assert "costs less" not in said


def test_without_prices_the_most_rows_a_rank_are_not_called_the_cheapest() -> None:
    points = (point_of("h100:1", 2e6), point_of("h100:8", 8e6))
    said = answer_of(points, choose(points, Target()), Target())
    assert "h100:1 trains the most rows a rank." in said
    assert "cheapest" not in said


def test_a_cluster_without_room_is_no_recommendation_while_another_has_some() -> None:
    full, roomy = point_of("h100:1", 5e6, headroom=0.01), point_of("h100:2", 5e6)
    assert choose((full, roomy), Target(rows_per_s=1e6)) == roomy
    assert choose((full,), Target(rows_per_s=1e6)) == full
    said = answer_of((full, roomy), roomy, Target(rows_per_s=1e6))
    assert "h100:1 costs less" in said
    assert "1% of its fullest" in said
    assert "costs less" not in answer_of((roomy,), roomy, Target(rows_per_s=1e6))


def test_a_full_cluster_that_reaches_the_target_is_not_denied() -> None:
    full, roomy = point_of("h100:1", 5e6, headroom=0.01), point_of("h100:2", 3e6)
    target = Target(rows_per_s=4e6)
    assert choose((full, roomy), target) is None
    said = answer_of((full, roomy), None, target)
    assert "No cluster of the sweep with 5% of its memory free reaches 4M rows/s" in said
    assert "the fastest, h100:2 with 1,024 rows a rank, trains 3M rows/s" in said
    assert "h100:1 with 1,024 rows a rank reaches it with 5M rows/s, but 1% of its" in said


def test_of_the_clusters_that_fit_nothing_todays_largest_says_why() -> None:
    small, large, later = (
        point_of(topology, 1.0, refusal=f"{why} short", growth=growth)
        for topology, why, growth in (("h100:1", "9", 1.0), ("h100:2", "5", 1.0),
                                      ("h100:2", "99", 2.0))
    )  # fmt: skip
    said = answer_of((small, large, later), None, Target())
    assert "h100:2: 5 short" in said


def test_the_batch_that_is_shown_is_the_chosen_one_or_has_room() -> None:
    tight = point_of("h100:1", 9e6, batch_size_per_rank=4096, headroom=0.01)
    roomy, small = point_of("h100:1", 7e6), point_of("h100:1", 3e6, batch_size_per_rank=64)
    full = point_of("h100:2", 5e6, headroom=0.0)
    points = (small, tight, roomy, full)
    assert best_batches(points, None) == [roomy, full]
    assert best_batches(points, small) == [small, full]


def test_the_terminal_shows_the_chosen_cluster_however_long_the_sweep_is() -> None:
    points = tuple(point_of(f"h100:{hosts}x8", 1e6 * hosts) for hosts in range(1, 31))
    for chosen in (points[3], points[29]):
        answer = CapacityAnswer(
            recipe="demo",
            answer="",
            target=Target(),
            chosen=chosen,
            dense=DENSE,
            points=points,
            seconds=1.0,
        )
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(points_table(answer))
        shown = console.export_text()
        assert f" {chosen.topology} " in shown
        assert shown.count("h100:") == 24
        assert "6 more in the JSON" in shown


def test_a_span_beyond_ten_years_is_no_number_of_days() -> None:
    soon = point_of("h100:1", 5e6).model_copy(update={"breaks_at_growth": 2.0, "days_left": 500.0})
    late = soon.model_copy(update={"days_left": 150_079.0})
    target = Target(rows_per_s=1e6)
    assert "in about 500 days" in answer_of((soon,), soon, target)
    assert "in more than ten years" in answer_of((late,), late, target)
    assert "150" not in answer_of((late,), late, target)


def test_grown_tables_are_not_todays() -> None:
    later = point_of("h100:1", 9e6, growth=2.0)
    assert choose((later, point_of("h100:2", 2e6)), Target(rows_per_s=1e6)) != later


def test_the_answer_names_cluster_time_and_end() -> None:
    point = point_of("h100:2", 2e6, days_left=200.0)
    said = answer_of((point,), point, Target(rows_per_day=7200e6, window_hours=2))
    for words in ("h100:2 is the smallest", "7.2G rows take 1h00m of the 2h", "70% stay free",
                  "3.00 times", "about 200 days", "a table is short", "calibrate"):  # fmt: skip
        assert words in said
    said = answer_of((point,), None, Target(rows_per_s=3e6))
    assert "No cluster of the sweep reaches 3M rows/s" in said
    assert "h100:2" in said
    refusal = point_of("h100:2", 2e6, refusal="too small")
    assert "fit none" in answer_of((refusal,), None, Target())
    assert "too small" in answer_of((refusal,), None, Target())


def test_the_report_shows_every_cluster_and_the_chosen_one(tmp_path: Path) -> None:
    slow = point_of("h100:8", 6e6, batch_size_per_rank=64)
    fast = point_of("h100:8", 8e6)
    refusal = point_of("l40s:1", 1.0).model_copy(
        update={"refusal": "tables are 3 GiB short", "rows_per_s": None}
    )
    points = (point_of("h100:1", 1e6), slow, fast, refusal)
    assert [p.rows_per_s for p in best_batches(points, None)] == [1e6, 8e6, None]
    for chosen in (fast, None):
        answer = CapacityAnswer(
            recipe="demo",
            answer=answer_of(points, chosen, Target(rows_per_s=7e6)),
            target=Target(rows_per_s=7e6),
            chosen=chosen,
            dense=DENSE,
            points=points,
            seconds=3.0,
        )
        path = tmp_path / "capacity.html"
        write_capacity_report(answer, path)
        page = path.read_text()
        assert page.count("<svg") == 3
        for words in ("h100:1", "h100:8", "l40s:1", "3 GiB short", "does not fit"):
            assert words in page
        assert ('class="chosen"' in page) == (chosen is not None)
        again = CapacityAnswer.model_validate_json(answer.model_dump_json())
        assert again == answer


def test_a_cluster_whose_hosts_are_full_is_no_recommendation() -> None:
    full = point_of("h100:1", 5e6, headroom=0.02, host_headroom=0.02, host_bytes=90)
    roomy = point_of("h100:2", 5e6, headroom=0.4, host_headroom=0.4, host_bytes=50)
    assert choose((full, roomy), Target(rows_per_s=1e6)) == roomy
    said = answer_of((full, roomy), roomy, Target(rows_per_s=1e6))
    assert "and 70% stay free; in the memory of its host" in said
    assert "take 0.0 KiB, and 40% stay free" in said
    assert "2% of its fullest host's memory would stay free" in said


def test_epochs_multiply_the_rows_of_a_retraining() -> None:
    """7.2 G rows in two hours are 1 M rows/s; read three times, 3 M."""
    target = Target(rows_per_day=7200e6, window_hours=2, epochs=3)
    assert target.needed_rows_per_s == 3e6
    assert Target(rows_per_day=7200e6, window_hours=2).needed_rows_per_s == 1e6
    point = point_of("h100:2", 6e6)
    assert "7.2G rows in 3 epochs take 1h00m of the 2h" in answer_of((point,), point, target)
    recipe = load_recipe("demo", ["ranking.trainer.epochs=3"])
    request = sweep_request(recipe, SweepOptions(("h100:8",), rows_per_day=7200e6, window_hours=2))
    assert request.target.needed_rows_per_s == 3e6


def test_another_batch_than_the_recipes_and_what_hosts_must_decode_are_said() -> None:
    settings = ["cluster.num_workers=2", "ranking.trainer.batch_size_per_rank=512"]
    recipe = load_recipe("demo", settings)
    point = point_of("h100:4x8", 8e6)
    said = answer_of((point,), point, Target(), recipe)
    assert "A step takes 32,768 rows, the recipe's 1,024 (2 x 512): learning rates may" in said
    assert "every host has to read and decode 2M rows/s" in said
    same = point_of("h100:1", 1e6)
    assert "learning rates" not in answer_of((same,), same, Target(), recipe)


def test_the_command_for_a_points_plan_repeats_what_it_was_planned_with() -> None:
    """With the recipe alone it made another plan than the one that was recommended."""
    measured = {"traffic": Path("t.json"), "calibration": Path("cpu.json")}
    recipe = load_recipe("demo")
    sharding = recipe.embedding.sharding.model_copy(update=measured)
    given = recipe.model_copy(
        update={"embedding": recipe.embedding.model_copy(update={"sharding": sharding})}
    )
    point = point_of("h100:2x8", 1e6)
    override = "ranking.tasks=[{name: click}]"
    start = f"braid plan -r demo -t h100:2x8 --batch-size-per-rank {point.batch_size_per_rank}"

    calibrated = point.model_copy(update={"calibration": Path("my h100.json")})
    assert plan_line(calibrated, "demo", given, [override]) == (
        f"{start} --traffic t.json --calibration 'my h100.json' --set '{override}'"
    )
    assert plan_line(point, "demo", given) == (
        f"{start} --traffic t.json --set embedding.sharding.calibration=null"
    )
    assert plan_line(point, "demo", recipe) == start

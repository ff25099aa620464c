"""The search: sums against sums from nothing, optima against brute force, and TorchRec's plan."""

import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding.config import RowWiseAdagrad, ShardingConfig, TableConfig, TableWise
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning import search as search_module
from embedding.planning.choices import DENSE, FUSED, UVM, UVM_CACHING, Choice, choices_of
from embedding.planning.cluster_shape import ClusterShape, find_machine, parse_shape
from embedding.planning.cost import CostModel, Placed, usage_of
from embedding.planning.cost_constants import data_sheet_constants
from embedding.planning.demand import StepSettings
from embedding.planning.layout import Layout, layout_of
from embedding.planning.plan import describe_plan, torchrec_plan
from embedding.planning.plan_samples import all_sensible, sample_tables
from embedding.planning.planner import PlanRequest, find_plan, plan_tables, shortlist_plans
from embedding.planning.prediction import describe, placement_of
from embedding.planning.search import all_placed, canonical, search
from embedding.planning.sharders import make_sharders
from embedding.planning.topology import torchrec_topology
from embedding.shard import declare_optimizer
from tests.embedding.toy import ToyModel, toy_schema

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def request_of(schema: FeatureSchema, topology: str, batch_size: int = 512) -> PlanRequest:
    return PlanRequest(
        schema=schema,
        shape=parse_shape(topology),
        settings=StepSettings(batch_size, RowWiseAdagrad()),
    )


def small_model(seed: int, topology: str) -> tuple[CostModel, dict[str, list]]:
    tables = sample_tables(seed, max_tables=5)
    request = request_of(tables.schema, topology, tables.batch_size_per_rank)
    model = request.model()
    return model, {n: choices_of(load, request.shape, (FUSED,)) for n, load in model.loads.items()}


@pytest.mark.parametrize("topology", ["cpu:2", "h100:2x4"])
def test_sums_kept_up_to_date_equal_sums_from_nothing(topology: str) -> None:
    model, options = small_model(3, topology)
    rng = np.random.default_rng(0)
    layout = Layout(model)
    for _ in range(60):
        table = str(rng.choice(list(options)))
        if table in layout.placement:
            layout.remove(table)
        choice = options[table][int(rng.integers(len(options[table])))]
        targets = layout.best_targets(table, choice)
        assert targets is not None
        expected = layout.cost_with(table, Placed(choice, targets))
        layout.add(table, Placed(choice, targets))
        assert layout.cost() == pytest.approx(expected)
    usage = usage_of(model, layout.placement)
    np.testing.assert_allclose(layout.seconds_PW, usage.seconds_PW, atol=1e-12)
    np.testing.assert_allclose(layout.device_bytes_W, usage.device_bytes_W)
    groups_s = sum(model.group_price(key) for key in usage.groups)
    assert layout.cost() == pytest.approx(model.step_seconds(usage.seconds_PW, groups_s))


@pytest.mark.parametrize("seed", range(4))
def test_few_tables_get_the_best_of_all_placements(seed: int) -> None:
    tables = sample_tables(seed, max_tables=3, min_tables=2)
    request = request_of(tables.schema, "cpu:2", tables.batch_size_per_rank)
    model = request.model()
    options = {n: choices_of(load, request.shape, (FUSED,)) for n, load in model.loads.items()}
    ways = [
        [(t, placed) for choice in options[t] for placed in all_placed(choice, model)]
        for t in options
    ]
    best = min(layout_of(model, dict(c)).cost() for c in itertools.product(*ways))
    found = find_plan(request, model)
    assert found is not None
    assert found.cost_s == pytest.approx(best)


@pytest.mark.parametrize("seed", [1, 4, 2001])
def test_the_shortlist_is_the_cheapest_placements_once_up_to_renamed_ranks(seed: int) -> None:
    tables = sample_tables(seed, max_tables=3, min_tables=2)
    request = request_of(tables.schema, "cpu:2", tables.batch_size_per_rank)
    model = request.model()
    options = {n: choices_of(load, request.shape, (FUSED,)) for n, load in model.loads.items()}
    ways = [[placed for c in options[t] for placed in all_placed(c, model)] for t in options]
    costs: dict[frozenset, float] = {}
    for combination in itertools.product(*ways):
        # Two ranks have two names: a placement and its mirror image are one.
        images = frozenset(
            tuple(
                (c, tuple(sorted(t ^ swap if c.domain == "rank" else t for t in targets)))
                for c, targets in combination
            )
            for swap in (0, 1)
        )
        costs[images] = layout_of(model, dict(zip(options, combination, strict=True))).cost()

    plans = shortlist_plans(request, 12)

    assert [plan.proposer for plan in plans] == [f"shortlist {n}" for n in range(1, 13)]
    predicted = [plan.predicted.step_s for plan in plans if plan.predicted is not None]
    assert predicted == pytest.approx(sorted(costs.values())[:12])
    assert plans[0].tables == plan_tables(request).tables


def test_placements_are_equal_exactly_if_renaming_hosts_and_their_ranks_makes_them_so() -> None:
    """Two tables, every way to place them on two hosts of two ranks, under all eight renamings."""
    tables = tuple(
        TableConfig(name=name, num_embeddings=1000, embedding_dim=32) for name in ("a", "b")
    )
    sparse = tuple(SparseFeature(name=f"f{t.name}", table=t.name) for t in tables)
    request = request_of(FeatureSchema(tables=tables, sparse=sparse), "h100:2x2")
    model = request.model()
    ways = [
        [
            placed
            for c in choices_of(load, request.shape, (FUSED,))
            for placed in all_placed(c, model)
        ]
        for load in model.loads.values()
    ]

    def renamed(placed: Placed, hosts: tuple[int, int], swaps: tuple[int, int]) -> tuple:
        choice, targets = placed
        names = {
            "all": lambda t: t,
            "host": lambda t: hosts[t],
            "rank": lambda t: 2 * hosts[t // 2] + (t % 2 ^ swaps[t // 2]),
        }
        return choice, tuple(sorted(map(names[choice.domain], targets)))

    found: dict = {}
    for combination in itertools.product(*ways):
        images = frozenset(
            tuple(renamed(placed, hosts, swaps) for placed in combination)
            for hosts in ((0, 1), (1, 0))
            for swaps in itertools.product((0, 1), repeat=2)
        )
        found.setdefault(canonical(combination, 2), set()).add(images)
    assert all(len(classes) == 1 for classes in found.values())
    assert len(set().union(*found.values())) == len(found)


def test_all_plans_of_two_hosts_put_two_tables_on_one_rank_one_host_and_two_hosts() -> None:
    tables = tuple(
        TableConfig(name=name, num_embeddings=1000, embedding_dim=8, sharding=TableWise())
        for name in ("a", "b")
    )
    sparse = tuple(SparseFeature(name=f"f{t.name}", table=t.name) for t in tables)
    request = request_of(FeatureSchema(tables=tables, sparse=sparse), "h100:2x2")
    model = request.model()
    options = {n: choices_of(load, request.shape, (FUSED,)) for n, load in model.loads.items()}
    places = [
        (placed["a"].targets[0], placed["b"].targets[0]) for placed in all_sensible(model, options)
    ]
    apart = sorted((a != b, a // 2 != b // 2) for a, b in places)
    assert apart == [(False, False), (True, False), (True, True)]


def test_local_search_comes_close_to_the_optimum_where_not_all_is_tried(monkeypatch) -> None:
    ratios = []
    for seed in range(6):
        model, options = small_model(seed, "cpu:2")
        best = min(layout_of(model, p).cost() for p in all_sensible(model, options))
        monkeypatch.setattr("embedding.planning.search.EXHAUSTIVE_LIMIT", 0)
        found = search(model, options)
        monkeypatch.undo()
        assert found is not None
        assert found.cost_s == pytest.approx(layout_of(model, found.placement).cost())
        ratios.append(found.cost_s / best)
    assert max(ratios) < 1.02


@pytest.mark.parametrize("topology", ["cpu:4", "h100:2x4"])
def test_never_worse_than_torchrecs_default_plan(topology: str) -> None:
    for seed in range(3):
        schema = sample_tables(seed, min_tables=6, max_tables=12).schema
        request = request_of(schema, topology)
        model = ToyTables(schema)
        declare_optimizer(model.tables, RowWiseAdagrad())
        theirs = torchrec_plan(
            model,
            make_sharders(ShardingConfig(), request.shape.machine.device),
            request.loads(),
            torchrec_topology(request.shape),
            512,
        )
        shape = request.shape
        described = describe_plan(theirs, schema, shape.world_size, shape.machine.device)
        cost = layout_of(request.model(), placement_of(described, request.loads(), shape)).cost()
        ours = plan_tables(request)
        assert ours.predicted is not None
        assert ours.predicted.step_s <= cost * (1 + 1e-9)


class ToyTables(torch.nn.Module):
    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        from embedding.tables import EmbeddingTables

        self.tables = EmbeddingTables(schema, torch.device("meta"))


def test_a_start_is_never_made_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that the search does not find: it is left with its worst proposal."""
    schema = sample_tables(11, min_tables=8).schema
    request = request_of(schema, "h100:2x4")
    start = plan_tables(request)
    monkeypatch.setattr(search_module, "_MAX_PASSES", 0)
    monkeypatch.setattr(search_module, "_proposed", _one_rank_for_all)

    alone, again = plan_tables(request), plan_tables(request, {"start": start})

    assert start.predicted is not None
    assert alone.predicted is not None
    assert again.predicted is not None
    assert alone.predicted.step_s > 1.1 * start.predicted.step_s
    assert again.predicted.step_s <= start.predicted.step_s * (1 + 1e-9)
    assert again.proposer == "start"


def _one_rank_for_all(
    base: Layout, model: CostModel, options: Mapping[str, Sequence[Choice]]
) -> Iterator[tuple[str, Layout]]:
    layout = base.copy()
    for table, choices in options.items():
        layout.add(table, Placed(next(c for c in choices if c.sharding == "table_wise"), (0,)))
    yield "worst", layout


def test_a_start_brings_in_no_kernel_or_sharding_that_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """TorchRec's own plan has caches where memory is short, whatever `--kernel` said."""
    schema = sample_tables(11, min_tables=8).schema
    request = request_of(schema, "h100:2x4")
    first, second, *_ = (table.name for table in schema.tables)
    start = plan_tables(request)
    cached = Choice("table_wise", UVM_CACHING, load_factor=0.5)
    placement = placement_of(start, request.loads(), request.shape)
    placement[first] = Placed(cached, (0,))
    begun = describe(request.model(), placement, "theirs", request.tables_path)
    monkeypatch.setattr(search_module, "_MAX_PASSES", 0)
    monkeypatch.setattr(search_module, "_proposed", _one_rank_for_all)
    kept = begun.table(second)
    assert kept is not None

    repaired = plan_tables(replace(request, kernels=(FUSED,)), {"theirs": begun})

    assert repaired.proposer == "theirs"
    assert repaired.table(second) == kept
    assert {table.kernel for table in repaired.tables} <= {FUSED, DENSE}
    assert f"theirs begins with {first} table_wise fused_uvm_caching 50%" in caplog.text


def test_a_cache_without_a_size_counts_as_large_as_torchrec_makes_it() -> None:
    """FBGEMM's cache of a fifth of the rows was planned as no bytes at all."""
    schema = sample_tables(11, min_tables=8).schema
    model = request_of(schema, "h100:2x4").model()
    name = schema.tables[0].name
    unsaid, fifth = (Choice("table_wise", UVM_CACHING, load_factor=f) for f in (None, 0.2))

    assert model.price(name, unsaid).owner_bytes == model.price(name, fifth).owner_bytes
    assert model.price(name, unsaid).mean_s == model.price(name, fifth).mean_s


def test_a_plan_is_the_same_in_every_process() -> None:
    code = (
        "from embedding.planning.plan_samples import sample_tables\n"
        "from tests.embedding.test_plan_search import request_of\n"
        "from embedding.planning.planner import plan_tables\n"
        "schema = sample_tables(5, min_tables=8).schema\n"
        "print(plan_tables(request_of(schema, 'h100:2x4')).model_dump_json())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_tables_that_do_not_fit_device_memory_go_to_host_memory() -> None:
    schema = sample_tables(2, min_tables=6).schema
    largest = max(t.num_embeddings * t.embedding_dim * 4 for t in schema.tables)
    machine = find_machine("h100").model_copy(update={"hbm_bytes": largest // 2})
    shape = ClusterShape(machine=machine, ranks_per_host=1)
    request = PlanRequest(
        schema=schema,
        shape=shape,
        settings=StepSettings(64, RowWiseAdagrad()),
        kernels=(FUSED, UVM, UVM_CACHING),
    )
    plan = plan_tables(request)
    assert {table.kernel for table in plan.tables} & {UVM, UVM_CACHING}
    assert plan.predicted is not None
    assert plan.predicted.peak_bytes <= request.model().device_capacity
    cached = [t for t in plan.tables if t.kernel == UVM_CACHING]
    assert all(0 < (t.cache_load_factor or 0) < 1 for t in cached)


def test_the_module_of_every_table_is_found_in_the_model() -> None:
    schema = toy_schema("table_wise")
    plan = plan_tables(request_of(schema, "cpu:2"))
    modules = dict(ToyModel(schema, torch.device("meta")).named_modules())
    for table in plan.tables:
        assert any(
            f".{table.table}." in f".{n}" for n, _ in modules[table.module].named_parameters()
        )


def test_the_data_sheet_prices_every_count() -> None:
    for topology in ("cpu:2", "h200:2x8"):
        constants = data_sheet_constants(parse_shape(topology))
        assert (constants.vector() > 0).all()


def test_buffers_count_on_ranks_that_get_no_unit() -> None:
    model, options = small_model(3, "cpu:2")
    first, second = list(options)[:2]
    choice = next(c for c in options[first] if c.sharding == "table_wise")
    layout = layout_of(model, {first: Placed(choice, (0,))})
    beside = next(c for c in options[second] if c.sharding == "table_wise")
    priced = model.price(second, beside)
    full = layout.device_bytes_W.max()
    assert layout.device_bytes_W[1] + priced.everyone_bytes + priced.owner_bytes < full
    model.device_capacity = full + priced.everyone_bytes
    assert layout.best_targets(second, beside) == (1,)
    model.device_capacity = full + 0.9 * priced.everyone_bytes
    assert layout.best_targets(second, beside) is None


def test_column_shards_that_share_a_rank_fit_together() -> None:
    model, options = small_model(3, "cpu:2")
    table = max(options, key=lambda name: model.loads[name].dim)
    choice = Choice("column_wise", FUSED, 4)
    priced = model.price(table, choice)
    layout = Layout(model)
    model.device_capacity = priced.everyone_bytes + 2 * priced.owner_bytes
    targets = layout.best_targets(table, choice)
    assert targets is not None
    assert sorted(targets) == [0, 0, 1, 1]
    model.device_capacity -= 1
    assert layout.best_targets(table, choice) is None

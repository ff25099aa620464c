"""Distinct items of a step: hand-computed, and against draws through the sampling of training."""

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from embedding.items import ItemRows
from embedding.planning.id_distribution import zipf
from embedding.planning.traffic import TableTraffic, Traffic
from multimodal.content_config import Gradient
from multimodal.gradient_items import own_rows
from pipeline.capacity.item_load import ItemLoad, _own_items, item_load, step_items
from pipeline.recipe import load_recipe


def load_of(items: tuple[float, ...], shares: tuple[float, ...], events: float) -> ItemLoad:
    return ItemLoad(
        num_items=int(sum(items)),
        counted="a test",
        bin_items=items,
        bin_shares=shares,
        events_per_row=events,
    )


def test_four_equal_items_on_two_ranks() -> None:
    """2 rows a rank, one event a row: candidates are 2 draws, all that is met 4 draws."""
    load = load_of((4.0,), (1.0,), 1.0)
    unbounded = {"max_items_per_step": None}
    shown, met = 1 - (3 / 4) ** 2, 1 - (3 / 4) ** 4

    targets = step_items(load, Gradient(items="targets", **unbounded), 2, 2)
    assert targets.candidates == pytest.approx(4 * shown)
    assert targets.read == pytest.approx(4 * met)
    assert targets.encoded == pytest.approx(4 * (1 - (1 - shown) ** 2))

    everything = step_items(load, Gradient(items="all", **unbounded), 2, 2)
    assert everything.encoded == pytest.approx(4 * (1 - (1 - met) ** 2))

    sampled = step_items(load, Gradient(sample_share=0.25, **unbounded), 2, 2)
    wanted = shown + 0.25 * (met - shown)
    assert sampled.encoded == pytest.approx(4 * (1 - (1 - wanted) ** 2))


def test_the_bound_holds_and_leaves_histories_their_part() -> None:
    load = load_of((1000.0,), (1.0,), 5.0)
    few = step_items(load, Gradient(items="targets", max_items_per_step=10), 100, 1)
    assert few.encoded == pytest.approx(10)
    both = step_items(load, Gradient(items="all", max_items_per_step=10), 100, 1)
    assert both.encoded == pytest.approx(10)
    roomy = step_items(load, Gradient(items="all", max_items_per_step=120), 100, 1)
    assert roomy.encoded == pytest.approx(120)
    ranks = step_items(load, Gradient(items="targets", max_items_per_step=10), 100, 8)
    assert ranks.encoded == pytest.approx(1000 * (1 - 0.99**8))

    # A quarter of the bound is the others', and what either side leaves is the other's.
    policy = Gradient(items="all", max_items_per_step=120)
    assert _own_items(policy, 95.2, 356.0) == (90, 30)
    assert _own_items(policy, 50.0, 356.0) == (50, 70)
    assert _own_items(policy, 95.2, 10.0) == (95.2, 10)
    sample = Gradient(sample_share=0.1, max_items_per_step=120)
    assert _own_items(sample, 500.0, 356.0) == (90, 30)
    assert _own_items(sample, 500.0, 100.0) == (110, 10)


def test_twice_the_items_are_met_as_twice_the_distribution() -> None:
    policy = Gradient(items="all", max_items_per_step=None)
    grown = step_items(load_of((10.0, 90.0), (0.5, 0.5), 3.0), policy, 64, 2, growth=2.0)
    doubled = step_items(load_of((20.0, 180.0), (0.5, 0.5), 3.0), policy, 64, 2)
    assert grown == doubled


@pytest.mark.parametrize("items", ["targets", "targets+sample", "all"])
@pytest.mark.parametrize("bound", [None, 40])
def test_expectations_are_what_training_draws(items: str, bound: int | None) -> None:
    num_items, batch, events, ranks = 300, 48, 6, 3
    policy = Gradient(items=items, sample_share=0.2, max_items_per_step=bound)
    ids = zipf(num_items, 1.0)
    popularity = np.repeat(np.array(ids.mass) / ids.num_rows, np.array(ids.num_rows).astype(int))
    rng = np.random.default_rng(0)
    drawn = []
    for trial in range(150):
        wanted, sizes = [], []
        for rank in range(ranks):
            rows = torch.from_numpy(rng.choice(num_items, batch * (1 + events), p=popularity))
            lengths_B = torch.full((batch,), events)
            batch_items = ItemRows.of(rows[:batch], {"past": (rows[batch:], lengths_B)})
            generator = torch.Generator().manual_seed(trial * ranks + rank)
            wanted.append(own_rows(batch_items, policy, generator))
            sizes.append((len(rows[:batch].unique()), len(rows.unique())))
        drawn.append((*np.mean(sizes, axis=0), len(torch.cat(wanted).unique())))
    load = load_of(ids.num_rows, ids.mass, float(events))
    expected = step_items(load, policy, batch, ranks)
    found = np.mean(drawn, axis=0)
    # 150 draws of some hundred items each: the mean strays by less than a percent. A bound on a
    # rank makes its choices depend on one another, which the expectation leaves out.
    np.testing.assert_allclose(found[:2], [expected.candidates, expected.read], rtol=0.01)
    np.testing.assert_allclose(found[2], expected.encoded, rtol=0.03)


def test_items_of_a_recipe_come_from_its_table_traffic_and_histories() -> None:
    recipe = load_recipe("demo", ["content={text: {}, dim: 8}"])
    assert recipe.content is not None
    schema = recipe.features
    table = next(f.table for f in schema.sparse if f.name == "item_id")
    rows = schema.table(table).num_embeddings
    longest = sum(history.max_length for history in schema.histories)

    unknown = item_load(recipe.content, schema, None)
    assert (unknown.num_items, unknown.counted) == (rows, f"rows of table {table!r}")
    assert unknown.events_per_row == longest
    assert unknown.bin_shares == zipf(rows, 1.0).mass

    known = item_load(recipe.content, schema, None, num_items=700)
    assert (known.num_items, known.counted) == (700, "items.parquet")
    assert sum(known.bin_items) == 700

    measured = TableTraffic(
        table=table,
        num_rows=rows,
        lookups=100,
        rows_touched=30,
        rows_seen_once=1,
        bin_rows=(10.0, 20.0),
        bin_shares=(0.7, 0.3),
    )
    sequence = next(s.name for s in schema.sequences if s.column_name == "item_id")
    traffic = Traffic(rows=9, rows_per_day=9, ids_per_sample={sequence: 4.5}, tables=(measured,))
    seen = item_load(recipe.content, schema, traffic, num_items=700)
    assert (seen.bin_items, seen.bin_shares) == ((10.0, 20.0), (0.7, 0.3))
    assert seen.events_per_row == 4.5
    without = recipe.content.model_copy(update={"in_history": False})
    assert item_load(without, schema, traffic).events_per_row == 0


def test_without_table_and_catalogue_the_number_of_items_is_asked_for() -> None:
    recipe = load_recipe("demo", ["content={text: {}, dim: 8, in_history: false, cic: null}"])
    assert recipe.content is not None
    schema = recipe.features.model_copy(
        update={
            "sparse": tuple(f for f in recipe.features.sparse if f.column_name != "item_id"),
            "sequences": (),
        }
    )
    with pytest.raises(UserError, match="the number of items is not known.*set data.root"):
        item_load(recipe.content, schema, None)
    assert item_load(recipe.content, schema, None, num_items=5).num_items == 5

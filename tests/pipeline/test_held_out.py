"""Items kept from training: no training row shows or remembers them, and none of theirs is lost."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_log
from small_log import DAYS, Row, event, make_recipe, write_catalogue, write_day

from pipeline.config import HeldOutItems, Recipe
from pipeline.samples import ingest as ingest_module
from pipeline.samples import join as join_module
from pipeline.samples.held_out import is_held_out
from pipeline.samples.ingest import check_span, ingest
from pipeline.samples.join import join
from pipeline.samples.join_facts import JoinFacts

HELD_OUT = HeldOutItems(share=0.4, seed=3)
NUM_ITEMS = 12


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ingest_module, join_module):
        monkeypatch.setattr(module, "stream_tasks", small_log.run_here)
    monkeypatch.setattr(join_module, "ROWS_PER_GROUP", 7)


def _rows(folder: Path) -> dict[int, Row]:
    paths = sorted(folder.glob("dt=*/*.parquet"))
    rows = [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]
    return {row["key:request_id"]: row for row in rows}


def _join(recipe: Recipe, directory: Path, out: str) -> JoinFacts:
    (directory / out).mkdir()
    return join(recipe, directory / "ingest", directory / out)


def test_training_rows_neither_show_nor_remember_held_out_items(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_catalogue(root, num_items=NUM_ITEMS)
    rng = np.random.default_rng(0)
    for day in (0, 1):
        rows = [
            event(
                day,
                1 + s % 3,
                s * s,
                item_id=1 + int(rng.integers(NUM_ITEMS)),
                click=1,
                stars=int(rng.integers(5)),
                request_id=100 * day + s,
            )
            for s in range(40)
        ]
        write_day(root, day, [rows])
    plain = make_recipe(root)
    evaluation = plain.evaluation.model_copy(update={"held_out_items": HELD_OUT})
    recipe = plain.model_copy(update={"evaluation": evaluation})
    (tmp_path / "ingest").mkdir()
    ingest(plain, check_span(plain, DAYS[:2], None), tmp_path / "ingest")
    _join(plain, tmp_path, "all")
    facts = _join(recipe, tmp_path, "split")

    whole = _rows(tmp_path / "all" / "samples")
    trained = _rows(tmp_path / "split" / "samples")
    held_out = _rows(tmp_path / "split" / "held_out")
    assert not (tmp_path / "all" / "held_out").exists()
    kept = {i for i in range(1, NUM_ITEMS + 1) if not is_held_out(np.array([i]), HELD_OUT)[0]}
    assert 0 < len(kept) < NUM_ITEMS
    assert {row["key:item_id"] for row in trained.values()} <= kept
    assert not {row["key:item_id"] for row in held_out.values()} & kept
    assert trained.keys() | held_out.keys() == whole.keys()
    assert len(trained) + len(held_out) == len(whole) == facts.rows
    assert facts.rows_held_out == len(held_out)
    forgotten = 0
    for request, row in (trained | held_out).items():
        expected = dict(whole[request])
        for items, names in (
            ("sequence:past_item", ("past_item", "past_category", "past_stars", "past_gap")),
            ("sequence:seen_item", ("seen_item",)),
        ):
            known = [item in kept for item in whole[request][items]]
            forgotten += known.count(False)
            for name in names:
                values = zip(whole[request][f"sequence:{name}"], known, strict=True)
                expected[f"sequence:{name}"] = [value for value, is_kept in values if is_kept]
        assert row == expected
    assert forgotten


def test_a_share_of_items_is_held_out_and_the_seed_draws_another_one() -> None:
    ids = np.arange(100_000)
    first = is_held_out(ids, HeldOutItems(share=0.2, seed=0))
    second = is_held_out(ids, HeldOutItems(share=0.2, seed=1))
    # Standard deviations of the share: sqrt(0.2 * 0.8 / 100000) = 0.0013.
    assert first.mean() == pytest.approx(0.2, abs=0.006)
    assert (first & second).mean() == pytest.approx(0.04, abs=0.004)
    assert is_held_out(ids[::-1].copy(), HeldOutItems(share=0.2, seed=0))[::-1].tolist() == (
        first.tolist()
    )


def test_a_warm_start_would_bring_what_is_held_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path).model_dump()
    recipe["evaluation"]["held_out_items"] = {}
    recipe["window"]["warm_start"] = True
    with pytest.raises(ValueError, match="set window.warm_start to false"):
        Recipe.model_validate(recipe)
    recipe["window"]["warm_start"] = False
    Recipe.model_validate(recipe)

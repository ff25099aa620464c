"""Codes of another output directory: what is taken, what follows a refit there, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from embedding.errors import UserError
from multimodal.codes.config import Codes
from multimodal.codes.versions import carries_between, find_version, load_version
from pipeline.artifacts import Manifest, publish, read_manifest
from pipeline.cluster import RaySession
from pipeline.codes.features import CODES_FILE
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.lookup import CodesOfRun
from pipeline.codes.paths import codes_version
from pipeline.codes.quantize import quantize
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.codes.quantize_stage import CodesOfDay, codes_of_day
from pipeline.config import HeldOutItems, Recipe
from pipeline.console import Reporter
from pipeline.days import Split
from pipeline.samples.held_out import is_held_out
from pipeline.stages import StageRecord, execute
from tests.pipeline.small_log import make_recipe
from tests.pipeline.stage_facts import coded

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
NUM_ITEMS = 90
PARTS: dict[str, Any] = {
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"top_k": 3, "max_items": 100},
    "suffix": {"num_codes": 8},
}
CODES = Codes.model_validate({**PARTS, "features": {"vector_dims": 2}})


def vectors() -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, 6))[np.arange(NUM_ITEMS) % 9]
    return (x + 0.3 * rng.standard_normal((NUM_ITEMS, 6))).astype(np.float32)


def quantized(out: Path, day: int) -> QuantizeFacts:
    manifest = read_manifest(out / DAYS[day] / "quantize", QuantizeFacts)
    assert manifest is not None
    return manifest.facts


def make_codes(out: Path, day: int, **changes: Any) -> None:
    """The codes of a day, fitted anew: the first 50 items on the first, 20 more on each other."""
    scratch = out.parent / f"scratch-{out.name}-{day}"
    scratch.mkdir(parents=True)
    version = codes_version(out / DAYS[day - 1] / "quantize") if day else None
    ids, x = np.arange(1, NUM_ITEMS + 1), vectors()
    seen = changes.get("seen", ids <= 50 + 20 * day)
    items = ItemVectors(ids, x, "tower", DAYS[0], DAYS[day], version=version, seen_N=seen)
    codes = changes.get("codes", CODES)
    facts = quantize(codes, items, out / "codebooks", scratch, force_refit=version is not None)
    told = coded(facts, DAYS[day - 1] if day else None, settings=codes.shared)
    (out / DAYS[day]).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / DAYS[day] / "quantize", ignore_errors=True)
    name = changes.get("artifact_id", f"codes-of-{day}")
    manifest = Manifest(stage="quantize", artifact_id=name, config_hash="c", facts=told)
    publish(scratch, out / DAYS[day] / "quantize", manifest)


@pytest.fixture
def maker(tmp_path: Path) -> Path:
    """Three days of codes, each with codebooks of its own."""
    out = tmp_path / "maker"
    for day in range(3):
        make_codes(out, day)
    return out


def taker(tmp_path: Path, maker: Path, **changes: Any) -> Recipe:
    """A recipe whose catalogue has one item more than there are codes."""
    root = tmp_path / "data"
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_id": np.arange(1, NUM_ITEMS + 2)}), root / "items.parquet")
    codes = {**PARTS, "taken_from": str(maker), **changes.pop("codes", {})}
    recipe = {**make_recipe(root).model_dump(mode="json"), "codes": codes, **changes}
    return Recipe.model_validate(recipe)


def of_day(recipe: Recipe, out: Path, day: int) -> CodesOfDay:
    split = Split(DAYS[: day + 1], DAYS[: day + 1], (), ("2026-01-09",))
    reporter = Reporter(Console(quiet=True))
    found = codes_of_day(recipe, out, split, RaySession(recipe.cluster), reporter)
    assert found is not None
    return found


def run(recipe: Recipe, out: Path, day: int) -> StageRecord:
    codes = of_day(recipe, out, day)
    assert list(codes.specs("align", "catalogue", (), None)) == []
    (spec,) = codes.specs("quantize", "catalogue", (), None)
    return execute(spec, codes.reporter)


def test_a_day_has_the_codes_of_the_other_directory_under_another_name(
    tmp_path: Path, maker: Path
) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"

    record = run(recipe, out, 2)

    theirs = maker / DAYS[2] / "quantize" / CODES_FILE
    ours = out / DAYS[2] / "quantize" / CODES_FILE
    assert ours.samefile(theirs)
    facts = quantized(out, 2)
    assert (facts.version, facts.taken_from) == ("v0003", str(maker))
    assert facts.stability is None  # there is no run before, whatever the other directory has
    assert record.manifest.inputs["taken"] == "codes-of-2"
    assert (record.manifest.rows_in, record.manifest.rows_out) == (NUM_ITEMS + 1, NUM_ITEMS)
    assert facts.num_without_vector == 1
    for version in ("v0001", "v0002", "v0003"):
        assert find_version(out / "codebooks", version) == find_version(
            maker / "codebooks", version
        )
    assert run(recipe, out, 2).status == "current"
    assert CodesOfRun.read(out).neighbours(0) == CodesOfRun.read(maker).neighbours(0)


def test_rows_mean_the_codes_that_were_trained_on_whatever_their_run_has_now(
    tmp_path: Path,
) -> None:
    out = tmp_path / "runs"
    make_codes(out, 0)
    trained_with = quantized(out, 0).codebooks
    assert trained_with.startswith("v0001-")
    make_codes(out, 1)
    shutil.copytree(out / DAYS[1] / "quantize", out / DAYS[0] / "quantize", dirs_exist_ok=True)
    assert quantized(out, 0).codebooks == quantized(out, 1).codebooks != trained_with
    root = tmp_path / "data"
    root.mkdir()
    recipe = Recipe.model_validate(
        {
            **make_recipe(root).model_dump(mode="json"),
            "codes": {**PARTS, "vectors": {"kind": "column"}},
        }
    )

    change = of_day(recipe, out, 1).change_since(trained_with)
    assert change is not None
    assert (change.before, change.after) == ("v0001", "v0002")
    assert of_day(recipe, out, 1).change_since(quantized(out, 1).codebooks) is None
    assert of_day(recipe, out, 1).change_since(None) is None
    with pytest.raises(UserError, match=r"v0001 holds codebooks .* trained with codes of v0001-0"):
        of_day(recipe, out, 1).change_since("v0001-0")


def test_rows_go_over_all_refits_between_two_runs(tmp_path: Path, maker: Path) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"
    run(recipe, out, 0)

    trained_with = quantized(out, 0).codebooks
    run(recipe, out, 2)

    change = of_day(recipe, out, 2).change_since(trained_with)
    assert change is not None
    assert (change.before, change.after) == ("v0001", "v0003")
    expected = carries_between(maker / "codebooks", "v0001", "v0003")
    shutil.rmtree(maker)  # nothing of it is needed any more
    found = carries_between(change.root, change.before, change.after)
    assert set(found) == set(expected) == {"sid_0", "sid_1", "vq"}
    for column, carry in found.items():
        assert carry.source_K.tolist() == expected[column].source_K.tolist()
        assert carry.carried_K.tolist() == expected[column].carried_K.tolist()
    before, after = (load_version(change.root, v).items for v in (change.before, change.after))
    assert before
    assert after
    # Items keep their slots; those that came have none of before.
    assert after.item_ids_N[:50].tolist() == before.item_ids_N.tolist()
    assert found["vq"].carried_K.tolist() == [True] * 50 + [False] * 40
    # Compared with the run of two days before, not with the other directory's of one day before.
    tables = [pq.read_table(out / DAYS[d] / "quantize" / CODES_FILE).to_pydict() for d in (0, 2)]
    codes = [list(zip(t["sid_0"], t["sid_1"], strict=True)) for t in tables]
    kept = np.mean([one == other for one, other in zip(*codes, strict=True)])
    second = quantized(out, 2)
    assert second.previous == DAYS[0]
    assert second.stability is not None
    assert second.stability.full == pytest.approx(kept)


def test_codes_that_are_made_again_are_taken_again(tmp_path: Path, maker: Path) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"
    run(recipe, out, 0)
    shutil.rmtree(maker / DAYS[0])
    shutil.rmtree(maker / "codebooks")
    assert run(recipe, out, 0).status == "current"  # gone is not changed
    shutil.rmtree(maker / DAYS[1])
    with pytest.raises(UserError, match="holds no codes of 2026-01-02"):
        of_day(recipe, out, 1)

    # The same identity, other codes.
    make_codes(maker, 0, seen=np.arange(NUM_ITEMS) % 2 == 0)

    (spec,) = of_day(recipe, out, 0).specs("quantize", "catalogue", (), None)
    assert not spec.is_current
    with pytest.raises(UserError, match=r"has codebooks v0001 \(\w+\) already, and those of"):
        run(recipe, out, 0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"rq": {"num_levels": 2, "codebook_size": 8}}, r"codes.rq.codebook_size=4 there, 8 here"),
        (
            {"rq": {"num_levels": 3, "codebook_size": 4}, "suffix": None},
            r'rq.num_levels=2 there, 3 here; codes.suffix=\{"num_codes": 8\} there, null here; set',
        ),
        ({"vq": {"top_k": 3, "index": {"kind": "exact"}}}, r"max_items=100 there, 10000 here"),
        ({"features": {"vector_dims": 3}}, r"hold 2 elements of .*vector_dims=3 asks for more"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, maker: Path, codes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        of_day(taker(tmp_path, maker, codes=codes), tmp_path / "taker", 2)


def test_what_is_not_there_is_named_with_what_makes_it(tmp_path: Path, maker: Path) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"
    with pytest.raises(UserError, match=f"taken_from={maker} is the output directory itself"):
        of_day(recipe, maker, 2)
    with pytest.raises(UserError, match="is the output directory itself"):
        of_day(recipe, maker.parent / "." / "maker", 2)
    nowhere = taker(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere is no directory; .*`braid stage quantize --reci"):
        of_day(nowhere, out, 2)
    shutil.rmtree(maker / DAYS[2])
    command = rf"stage quantize --recipe {maker}/2026-01-02/recipe.yaml --date 2026-01-03 --out"
    with pytest.raises(
        UserError, match=rf"no codes of 2026-01-03 \(there are: 2026-01-01, 2026-01-02\).*{command}"
    ):
        of_day(recipe, out, 2)


def test_codes_of_an_earlier_format_and_damaged_ones_are_refused(
    tmp_path: Path, maker: Path
) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"
    codes = maker / DAYS[1] / "quantize" / CODES_FILE
    codes.write_bytes(codes.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"is missing or damaged .* make the codes again: .*codes.version=v0\d"
    ):
        run(recipe, out, 1)
    path = maker / DAYS[1] / "quantize" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["settings"]["format"] -= 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"by another version of Braid; delete .*codes.version=v0\d"
    ):
        of_day(recipe, out, 1)


def test_vectors_that_hardly_differ_are_warned_of(tmp_path: Path, maker: Path) -> None:
    recipe, out = taker(tmp_path, maker), tmp_path / "taker"
    assert run(recipe, out, 0).manifest.warnings == ()
    path = maker / DAYS[1] / "quantize" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["mean_cosine"] = 0.97
    path.write_text(json.dumps(manifest))

    (warning,) = run(recipe, out, 1).manifest.warnings

    assert "item vectors hardly differ (mean cosine of two items 0.9700)" in warning


def test_another_catalogue_is_refused(tmp_path: Path, maker: Path) -> None:
    recipe = taker(tmp_path, maker)
    names = pa.table({"item_id": [f"film-{i}" for i in range(5)]})
    pq.write_table(names, recipe.data.root / "items.parquet")
    with pytest.raises(UserError, match=r"none of the 5 items of .* has codes of 2026-01-01 there"):
        run(recipe, tmp_path / "taker", 0)


def test_codebooks_that_know_held_out_items_are_refused(tmp_path: Path, maker: Path) -> None:
    held_out = HeldOutItems(share=0.3)
    changes = {"evaluation": {"held_out_items": {"share": 0.3}}, "window": {"warm_start": False}}
    known = int(is_held_out(np.arange(1, 51), held_out).sum())
    assert 0 < known < 50
    with pytest.raises(
        UserError, match=rf"v0001 were fitted to 50 items, {known} of them held out here"
    ):
        run(taker(tmp_path, maker, **changes), tmp_path / "taker", 0)
    # Nor does a refit without them forget what the codebooks before it were fitted to.
    ids = np.arange(1, NUM_ITEMS + 1)
    unseen = ~is_held_out(ids, held_out)
    late = tmp_path / "late"
    make_codes(late, 0)
    make_codes(late, 1, seen=unseen)
    with pytest.raises(UserError, match=r"v0001, which v0002 goes on with, were fitted to 50"):
        run(taker(tmp_path, late, **changes), tmp_path / "taker", 1)
    # Codes whose makers held out these items, and more of them, know none.
    careful = tmp_path / "careful"
    make_codes(careful, 0, seen=~is_held_out(ids, HeldOutItems(share=0.5)))
    assert run(taker(tmp_path, careful, **changes), tmp_path / "taker", 0).status == "ran"


def test_codes_of_its_own_do_not_go_on_with_codes_that_were_taken(
    tmp_path: Path, maker: Path
) -> None:
    out = tmp_path / "taker"
    run(taker(tmp_path, maker), out, 0)
    own = {"taken_from": None, "vectors": {"kind": "column"}}
    made = of_day(taker(tmp_path, maker, codes=own), out, 1)
    assert made._previous() is None
    assert of_day(taker(tmp_path, maker), out, 1)._previous() == DAYS[0]


def test_a_recipe_states_no_codebooks_of_codes_it_takes(tmp_path: Path, maker: Path) -> None:
    with pytest.raises(ValueError, match="codes.version=v0001 chooses codebooks where codes are"):
        taker(tmp_path, maker, codes={"version": "v0001"})
    # Vectors are the other recipe's business: this one has no towers.
    recipe = taker(tmp_path, maker)
    assert recipe.codes is not None
    assert not recipe.codes.has_alignment
    assert recipe.codes.with_seed_offset(3) == recipe.codes

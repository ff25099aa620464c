"""A recipe with codes: its features follow from one section, written out and read again."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deploy.bundle import Bundle
from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.codes.align_stage import alignment_settings
from pipeline.config import Recipe
from pipeline.identity import ingest_config, samples_config, training_config
from pipeline.recipe import load_recipe
from pipeline.study.study import Variant, read_variants
from tests.pipeline.small_log import make_recipe

ROOT = Path(__file__).parents[2]
COLUMN = {"kind": "column"}
CODES = {
    "vectors": COLUMN,
    "rq": {"num_levels": 2, "codebook_size": 8},
    "vq": {"max_items": 40},
}


class Holder(StrictConfig):
    """A job that carries a recipe to another process."""

    recipe: Recipe


def small(tmp_path: Path, codes: Any = CODES) -> dict[str, Any]:
    data = make_recipe(tmp_path / "data").model_dump(mode="json")
    return {**data, "codes": codes}


def write(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "coded.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, small(tmp_path)))
    names = [feature.name for feature in recipe.features.sparse]
    assert names[-4:] == [f"{h}_shared_{n}" for h in ("clicks", "seen") for n in (1, 2)]

    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)

    assert "sid_0" not in text
    again = load_recipe(write(tmp_path, yaml.safe_load(text)))
    assert again == recipe
    for holder in (Holder(recipe=recipe), Bundle(recipe=recipe, tables={}, files={})):
        assert type(holder).model_validate_json(holder.model_dump_json()).recipe == recipe
        assert type(holder)(**dict(holder)).recipe == recipe  # validated as an instance again


def test_null_switches_everything_off(tmp_path: Path) -> None:
    plain = make_recipe(tmp_path / "data")
    coded = write(tmp_path, small(tmp_path))

    off = load_recipe(coded, ["codes=null"])

    assert off == plain
    on = load_recipe(coded)
    assert ingest_config(on) == ingest_config(plain)
    assert samples_config(on) != samples_config(plain)
    assert training_config(on) != training_config(plain)


def test_overrides_reach_the_codes_and_the_recipes_own_features(tmp_path: Path) -> None:
    overrides = [
        "codes.rq.codebook_size=16",
        "codes.features.families=[candidate]",
        "features.tables.item.num_embeddings=7",
    ]
    recipe = load_recipe(write(tmp_path, small(tmp_path)), overrides)
    rows = {table.name: table.num_embeddings for table in recipe.features.tables}
    assert (rows["sid_0"], rows["item"], rows["vq"]) == (17, 7, 41)
    assert [f.name for f in recipe.features.sparse][-3:] == ["sid_0", "sid_1", "vq"]
    switched_on = load_recipe(
        write(tmp_path, small(tmp_path, None)), ["codes={vq: null, vectors: {kind: column}}"]
    )
    assert "vq" not in [table.name for table in switched_on.features.tables]


def test_variants_of_a_study_change_the_codes(tmp_path: Path) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text("ids: [codes=null]\nvq: [codes.rq=null]\nrq: [codes.vq=null]\nboth: []\n")
    found = read_variants(variants)
    assert found[0] == Variant("ids", ("codes=null",))
    path = write(tmp_path, small(tmp_path))
    tables = {
        v.name: {t.name for t in load_recipe(path, v.overrides).features.tables} for v in found
    }
    assert tables["both"] - tables["ids"] == {"sid_0", "sid_1", "vq"}
    assert tables["vq"] - tables["ids"] == {"vq"}
    assert tables["both"] - tables["rq"] == {"vq"}


def test_variants_of_the_benchmark_fit_the_recipe_they_are_for() -> None:
    text = "{text: {lora: null}, fusion: {kind: concat}, dim: 64}"
    codes = f"codes={{vectors: {{kind: aligned, content: {text}}}, vq: {{max_items: 4000}}}}"
    recipes = {
        variant.name: load_recipe("movielens_content", [codes, *variant.overrides])
        for variant in read_variants(ROOT / "benchmarks" / "codes_variants.yaml")
    }
    kinds = {n: r.codes.vectors.kind if r.codes else None for n, r in recipes.items()}
    assert kinds.pop("ids") is None
    assert kinds.pop("vq+rq+crosses-unaligned") == "towers"
    assert set(kinds.values()) == {"aligned"}
    assert [name for name, r in recipes.items() if r.content] == ["vq+rq+crosses+content"]
    dense = {
        name: len(r.features.dense) - len(recipes["ids"].features.dense)
        for name, r in recipes.items()
    }
    assert (dense["dense"], dense["vq"], dense["vq+rq"], dense["vq+rq+crosses"]) == (64, 0, 0, 2)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"rq": {"codebooksize": 8}}, r"codes.rq.codebooksize: unknown key; did you mean"),
        ({"vectors": {"kind": "file"}}, r"codes.vectors"),
        (
            {"features": {"histories": ["bought"]}},
            r"codes.features.histories: \['bought'\] are not",
        ),
        ({"rq": None, "vq": None}, r"codes: vq and rq are both null"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path: Path, codes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, small(tmp_path, codes)))


def test_code_features_are_not_written_by_hand(tmp_path: Path) -> None:
    data = small(tmp_path, None)
    data["features"]["sparse"].append({"name": "sid_0", "table": "item", "source": "codes"})
    with pytest.raises(ValidationError, match="follow from the section codes; remove those"):
        Recipe.model_validate(data)


def test_what_holds_activations_makes_another_alignment_with_dropout_only(tmp_path: Path) -> None:
    codes = {"vectors": {"kind": "aligned", "content": {"text": {}}}}
    path, fewer = write(tmp_path, small(tmp_path, codes)), "codes.vectors.items_per_chunk=8"
    content = "codes.vectors.content"
    for dropout in ("text.lora.dropout=0.1", "fusion={kind: fq_former, dropout: 0.1}"):
        drops = f"{content}.{dropout}"
        for given, equal in (((), True), ((drops,), False)):
            first = alignment_settings(load_recipe(path, given))
            second = alignment_settings(load_recipe(path, [*given, fewer]))
            assert (first == second) is equal


def test_no_more_earlier_positives_are_asked_for_than_a_history_keeps(tmp_path: Path) -> None:
    codes = {"vectors": {"kind": "aligned", "content": {"text": {}}}}
    path = write(tmp_path, small(tmp_path, codes))
    for limits in ([], ["codes.vectors.user2item.max_history=3"]):
        load_recipe(path, limits)  # the first history, clicks, keeps 3
    four = "codes.vectors.user2item.max_history=4"
    load_recipe(path, [four, "features.histories.clicks.max_length=4"])

    with pytest.raises(UserError, match=r"max_history=4, but the history 'clicks' keeps 3 events"):
        load_recipe(path, [four])
    with pytest.raises(UserError, match=r"max_history=3, but the history 'seen' keeps 2 .*lower"):
        load_recipe(path, ["codes.vectors.user2item.max_history=3", "codes.vectors.history=seen"])


def test_every_rank_of_an_alignment_has_a_pair(tmp_path: Path) -> None:
    codes = {"vectors": {"kind": "aligned", "content": {"text": {}}}}
    path = write(tmp_path, small(tmp_path, codes))
    load_recipe(path, ["codes.vectors.batch_size=4", "cluster.num_workers=4"])
    few = ["codes.vectors.batch_size=4", "cluster.num_workers=5"]
    with pytest.raises(UserError, match=r"batch_size=4 pairs .* cluster.num_workers=5 ranks"):
        load_recipe(path, few)
    load_recipe(path, [*few, "codes.vectors={kind: towers, content: {text: {}}}"])

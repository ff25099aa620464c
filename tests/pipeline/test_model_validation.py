"""Faults of the model that `braid validate` must name, without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.app import main
from embedding.errors import UserError
from pipeline.content.items import content_shape
from pipeline.recipe import load_recipe
from ranking.model import RankingModel
from tests.pipeline.test_recipe import changed, write

ROOT = Path(__file__).parents[2]
MODEL = "ranking.model"
META = torch.device("meta")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            f"{MODEL}.generator",
            {"maps": [14, 16], "heights": [7], "pools": [2, 2], "new_maps": [3, 3]},
            [f"{MODEL}.generator", "maps has 2, heights has 1", "the same number of entries"],
        ),
        (
            f"{MODEL}.generator",
            {"maps": [], "heights": [], "pools": [], "new_maps": []},
            [f"{MODEL}.generator", "maps has 0", "at least one"],
        ),
        (
            f"{MODEL}.generator",
            {"pool_rounding": "floor"},
            [f"{MODEL}.generator.pools.1", "a pool of 2 empties the 1 fields", "at most 1", "ceil"],
        ),
        (
            f"{MODEL}.generator",
            {"pooling": "ceil"},
            [f"{MODEL}.generator.pooling", "did you mean", "pool"],
        ),
        (f"{MODEL}.field_dim", 10, [f"{MODEL}.field_dim", "multiple of 4", "got 10"]),
        (
            "features.tables.item.embedding_dim",
            18,
            [
                "features.tables.0: table 'item'",
                "embedding_dim=18 must be a multiple of 4",
                "use 20",
            ],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "ipn"},
            [f"{MODEL}.classifier.kind: 'ipn' is unknown", "did you mean 'ipnn'?", "'final_mlp'"],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "final_mlp", "num_heads": 3},
            [f"{MODEL}.classifier", "num_heads=3 must divide", "(128)", "change one of them"],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "ccpm", "maps": [4], "heights": [3, 3]},
            [f"{MODEL}.classifier", "maps has 1, heights has 2"],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "xdeepfm", "maps": []},
            [f"{MODEL}.classifier.maps", "at least 1 item"],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "masknet", "form": "serial", "dropout": 0.1},
            [f"{MODEL}.classifier", "form=serial", "no MLP for dropout", "form=parallel"],
        ),
        (
            f"{MODEL}.generator",
            {"blocks": "mlp", "batch_norm": True},
            [f"{MODEL}.generator", "blocks=mlp has no convolution", "batch_norm to false"],
        ),
        (
            f"{MODEL}.interests",
            [{"kind": "din", "history": "clicks"}],
            [f"{MODEL}.interests: history 'clicks' is not among the histories []"],
        ),
        (
            f"{MODEL}.classifier",
            {"kind": "dnn", "dropout": 1.0},
            [f"{MODEL}.classifier.dropout", "less than 1", "got 1.0"],
        ),
    ],
)
def test_fault_of_a_model_names_place_value_and_remedy(
    tmp_path: Path, path: str, value: Any, expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, changed(path, value)))

    for text in expected:
        assert text in str(caught.value)


def recipe_of(model: dict[str, Any], item_dim: int) -> dict[str, Any]:
    data = changed("features.tables.item.embedding_dim", item_dim)
    data["ranking"]["model"] = model
    return data


@pytest.mark.parametrize("kind", ["fm", "ipnn", "autoint", "dlrm", "masknet"])
def test_a_classifier_that_combines_fields_names_the_tables_to_change(
    tmp_path: Path, kind: str
) -> None:
    model = {"classifier": {"kind": kind}}
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, recipe_of(model, 32)))
    for text in (
        f"{MODEL}.classifier: {kind} combines",
        "{'user': 16}",
        "features.tables.<name>.embedding_dim=32",
        f"{MODEL}.field_dim=32",
    ):
        assert text in str(caught.value)

    load_recipe(write(tmp_path, recipe_of(model | {"field_dim": 16}, 32)))


@pytest.mark.parametrize("kind", ["lr", "dnn", "wide_deep", "dcn_v2", "final_mlp"])
def test_other_classifiers_take_any_dims_but_the_generator_does_not(
    tmp_path: Path, kind: str
) -> None:
    model: dict[str, Any] = {"classifier": {"kind": kind}}
    load_recipe(write(tmp_path, recipe_of(model, 32)))
    model["generator"] = {}
    with pytest.raises(UserError, match=r"ranking.model.generator: fgcnn combines"):
        load_recipe(write(tmp_path, recipe_of(model, 32)))


def test_a_single_field_cannot_be_combined(tmp_path: Path) -> None:
    data = changed("ranking.model", {"classifier": {"kind": "fm"}})
    data["features"]["sparse"].pop()
    data["features"]["tables"].pop()
    with pytest.raises(UserError, match="fm combines fields, but there is 1; add a sparse feature"):
        load_recipe(write(tmp_path, data))


@pytest.mark.parametrize(
    ("settings", "is_fine"),
    [
        ({"classifier": {"kind": "dlrm"}}, True),  # dense features are its second field
        ({"classifier": {"kind": "fm"}, "content": {"in_history": False}}, True),
        ({"classifier": {"kind": "fm"}, "content": {"in_history": True}}, True),
        ({"classifier": {"kind": "dlrm"}, "dense": []}, False),
    ],
)
def test_one_sparse_feature_is_enough_beside_other_fields(
    tmp_path: Path, settings: dict[str, Any], is_fine: bool
) -> None:
    data = changed("ranking.model", {"classifier": settings["classifier"]})
    data["features"]["sparse"].pop()
    data["features"]["tables"].pop()
    data["features"]["dense"] = settings.get("dense", [{"name": "price"}])
    if "content" in settings:
        data["content"] = {"text": {"model": "tiny", "lora": None}, **settings["content"]}
    path = write(tmp_path, data)
    if is_fine:
        recipe = load_recipe(path)
        shape = None if recipe.content is None else content_shape(recipe.content, recipe.features)
        RankingModel(recipe.features, recipe.ranking, tables_device=META, content=shape)
    else:
        with pytest.raises(UserError, match="dlrm combines fields, but there is 1"):
            load_recipe(path)


def validated(*words: str) -> str:
    """What `braid validate` says of a recipe that it refuses, without torch."""
    code = (
        "import sys\n"
        "from deploy.app import main\n"
        f"code = main({['validate', *words]!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    return " ".join(done.stderr.split())


def test_model_faults_are_found_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, changed(f"{MODEL}.generator", {"pool_rounding": "floor"}))
    assert f"{MODEL}.generator.pools.1" in validated("--recipe", path)


def test_towers_that_a_stage_would_refuse_are_found_without_torch() -> None:
    hub = "content={text: {model: intfloat/multilingual-e5-small}}"
    said = validated("--recipe", "demo", "--set", hub)
    assert "content.text: tower model 'intfloat/multilingual-e5-small' is a hub id" in said
    assert "set `revision` beside `model`" in said


def test_a_run_whose_towers_are_not_there_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    towers = f"{{kind: towers, content: {{text: {{model: {gone}}}}}}}"
    data, out = tmp_path / "data", tmp_path / "out"
    words = ["--set", f"codes={{vectors: {towers}}}", "--set", f"data.root={data}"]
    words += ["--date", "2024-01-07", "--out", str(out)]
    assert main(["run", "--recipe", "demo", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"codes.vectors.content.text: tower model '{gone}': there is no such directory" in said
    assert not data.exists()


def test_what_an_interest_needs_of_its_history_is_said(tmp_path: Path) -> None:
    data = changed("ranking.model", {"interests": [{"kind": "hstu", "history": "h", "gap": "age"}]})
    data["features"] |= {
        "histories": [{"name": "h"}],
        "sequences": [{"name": "past", "history": "h", "table": "item"}],
    }
    with pytest.raises(UserError, match=r"no sequence of history 'h' names a target.*\['past'\]"):
        load_recipe(write(tmp_path, data))

    data["features"]["sequences"][0]["target"] = "item_id"
    with pytest.raises(UserError, match=r"gap 'age' is not among .* source gap \[\]"):
        load_recipe(write(tmp_path, data))

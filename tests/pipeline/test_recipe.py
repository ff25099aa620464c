import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from embedding.config import RowWise
from embedding.errors import UserError
from embedding.names import TAKEN_NAMES
from pipeline.config import EmbeddingPlaneConfig, WindowConfig
from pipeline.identity import plan_config
from pipeline.recipe import apply_override, load_recipe
from ranking.config import RankingConfig, TaskConfig

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"root": "data/small"},
    "features": {
        "tables": [
            {"name": "item", "num_embeddings": 100, "ids": {"kind": "identity"}},
            {"name": "user", "num_embeddings": 100, "sharding": {"kind": "row_wise"}},
        ],
        "sparse": [
            {"name": "item_id", "table": "item"},
            {"name": "user_id", "table": "user"},
        ],
    },
    "ranking": {"tasks": [{"name": "click"}]},
    "gate": {"task": "click"},
}


def write(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def changed(path: str, value: Any) -> dict[str, Any]:
    data = yaml.safe_load(yaml.safe_dump(SMALL))
    apply_override(data, f"{path}={yaml.safe_dump(value, default_flow_style=True)}")
    return data


def test_recipe_loads_with_unions_resolved(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))

    assert recipe.features.table("user").sharding == RowWise()


def test_override_reaches_list_entries_by_name_and_index(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)

    recipe = load_recipe(
        path,
        ["features.tables.item.embedding_dim=32", "features.tables.1.embedding_dim=8"],
    )

    assert [table.embedding_dim for table in recipe.features.tables] == [32, 8]


def test_override_adds_entries_to_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    names = [table.name for table in load_recipe(path).features.tables]

    recipe = load_recipe(
        path,
        [
            "features.tables+={name: brand, num_embeddings: 9, embedding_dim: 8}",
            "features.sparse+={name: brand, table: brand, source: items}",
            "features.tables.brand.embedding_dim=16",
            "features.dense+={name: price}",
        ],
    )

    assert [table.name for table in recipe.features.tables] == [*names, "brand"]
    assert recipe.features.table("brand").embedding_dim == 16
    assert "price" in [feature.name for feature in recipe.features.dense]


def test_a_key_that_is_set_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    text = yaml.safe_dump(SMALL, sort_keys=False)
    path.write_text(text + "window:\n  eval_days: 1\n  train_days: 3\n  eval_days: 2\n")
    line = len(text.splitlines()) + 4

    expected = rf"small.yaml, line {line}: window.eval_days is set a second .*in line {line - 2}\)"
    with pytest.raises(UserError, match=expected):
        load_recipe(str(path))
    with pytest.raises(UserError, match=r"--set .*line 1: kind is set a second time"):
        load_recipe(write(tmp_path, SMALL), ["embedding.optimizer={kind: adam, kind: sgd}"])


def test_override_creates_missing_sections(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALL), ["ranking.trainer.dense_optimizer.learning_rate=1e-2"]
    )

    assert recipe.ranking.trainer.dense_optimizer.learning_rate == 0.01


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "ranking.trainer.batchsize_per_rank",
            3,
            ["ranking.trainer.batchsize_per_rank", "did you mean 'batch_size_per_rank'"],
        ),
        (
            "features.tables.item.embeding_dim",
            3,
            ["features.tables.item.embeding_dim", "did you mean 'embedding_dim'"],
        ),
        (
            "features.tables.user.sharding.shards",
            3,
            ["user.sharding.shards: unknown key", "replace all of features.tables.user.sharding"],
        ),
        (
            "features.tables.item.embedding_dim",
            10,
            ["embedding_dim=10 must be a multiple of 4", "use 12"],
        ),
        ("features.tables.item.ids.kind", "hash", ["features.tables.item.ids", "'hashed'"]),
        ("features.sparse.item_id.table", "items", ["table 'items' is not among", "mean 'item'?"]),
        ("ranking.model.classifier", "dnn", ["ranking.model.classifier: a section", "{kind: dnn}"]),
        (
            "embedding.optimizer",
            "momentum",
            ["write {kind: row_wise_adagrad | adagrad | adam | sgd}"],
        ),
        (
            "embedding.sharding.ranks_per_host",
            3,
            ["embedding.sharding.ranks_per_host=3 does not divide cluster.num_workers="],
        ),
        ("gate.task", "clack", ["gate.task: 'clack'", "['click']"]),
        (
            "ranking.trainer.validation.every_steps",
            100,
            ["ranking.trainer.validation.every_steps", "set window.validation_days to 1"],
        ),
        (
            "ranking.trainer.validation.patience",
            2,
            ["ranking.trainer.validation.patience", "set window.validation_days to 1"],
        ),
        (
            "ranking.trainer.schedule.plateau",
            {"factor": 0.5},
            ["ranking.trainer.schedule.plateau", "set window.validation_days to 1"],
        ),
        ("ranking.trainer.validation.task", "buy", ["'buy' is not among the tasks ['click']"]),
        ("ranking.tasks.click.after", "view", ["after='view' is not among", "add it"]),
        (
            "ranking.model.experts",
            {"kind": "moe"},
            ["ranking.model.experts", "'shared_bottom', 'mmoe', 'ple'"],
        ),
        (
            "ranking.model.interests",
            [{"kind": "hstu", "history": "clicks", "heads": 4}],
            ["ranking.model.interests.0.heads", "did you mean 'num_heads'"],
        ),
        ("embedding.optimizer", {"kind": "adam"}, ["embedding.optimizer: 'adam'", "CUDA only"]),
        (
            "embedding.sharding.communication",
            "bf16",
            ["embedding.sharding.communication: bf16 is not supported", "use fp16 or fp32"],
        ),
        (
            "features.tables.user.sharding",
            {"kind": "column_wise", "num_shards": 8},
            ["features.tables.user.sharding: 8 column shards of 16 columns", "one of 1, 2, 4"],
        ),
        ("gate.calibration", [2, 1], ["gate.calibration: [2, 1] allows no model", "[low, high]"]),
        ("gate.calibration", [-1, 1], ["gate.calibration: [-1, 1]"]),
        ("ranking.trainer.epochs", 0, ["ranking.trainer.epochs", "greater than 0", "got 0"]),
        *(
            (path, value, [path, "finite number"])
            for path in ("ranking.trainer.max_grad_norm", "embedding.l2", "gate.max_auc_drop")
            for value in (math.inf, math.nan)
        ),
        ("features.dense", [{"name": "price", "mean": math.nan}], ["mean: ", "finite number"]),
        (
            "embedding.optimizer",
            {"kind": "adam", "beta1": 1.0},
            ["embedding.optimizer.beta1", "less than 1"],
        ),
        (
            "embedding.optimizer",
            {"learning_rate": 0.1},
            ["embedding.optimizer.kind: required", "one of row_wise_adagrad, ", "adam"],
        ),
        (
            "ranking.model.interests",
            [{"history": "clicks"}],
            ["ranking.model.interests.0.kind: required", "din, "],
        ),
        ("embedding.sharding.kernels", [], ["embedding.sharding.kernels", "at least 1 item"]),
        (
            "data.synthetic",
            {"first_day": "banana"},
            ["data.synthetic.first_day", "valid date", "got 'banana'"],
        ),
        *(
            (path, name, [f"name: {name!r} is no name", "letters, digits, _ and -"])
            for path in (
                "features.tables.0.name",
                "features.sparse.0.name",
                "ranking.tasks.0.name",
            )
            for name in ("a/b", "a.b", "a:b", "", "a b", "_a")
        ),
        ("features.tables.0.name", "type", ["features.tables.type.name", "call it `type_`"]),
        ("features.histories", [{"name": "items"}], ["features.histories.items.name", "`items_`"]),
        ("features.histories", [{"name": "a.b"}], ["'a.b' is no name"]),
        (
            "features.sequences",
            [{"name": "a/b", "history": "clicks", "table": "item"}],
            ["'a/b' is no name"],
        ),
        ("features.dense", [{"name": "a:b"}], ["'a:b' is no name"]),
        *(
            ("features.dense", [{"name": "x", "column": column}], [repr(column), what, "leave it"])
            for column, what in (("click", "label of a task"), ("oracle_click", "probability"))
        ),
        (
            "features.histories",
            [{"name": "seen", "delay_s": 60, "columns": {"item_id": "recent"}}],
            ["'seen': delay_s=60", "leave it out"],
        ),
    ],
)
def test_fault_names_place_value_and_remedy(
    tmp_path: Path, path: str, value: Any, expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, changed(path, value)))

    for text in expected:
        assert text in str(caught.value)


def test_sharding_is_checked_for_sequences_and_for_the_width_with_the_generators_columns(
    tmp_path: Path,
) -> None:
    data = changed("features.tables.user.sharding", {"kind": "grid", "num_column_shards": 4})
    load_recipe(write(tmp_path, data))
    data["features"]["histories"] = [{"name": "seen"}]
    data["features"]["sequences"] = [
        {"name": "past", "history": "seen", "table": "user", "source": "events", "column": "x"}
    ]
    with pytest.raises(UserError, match=r"features\.tables\.user\.sharding: grid works for pooled"):
        load_recipe(write(tmp_path, data))

    # 16 columns of the classifier and 16 of the generator.
    data = changed("features.tables.user.sharding", {"kind": "column_wise", "num_shards": 8})
    data["ranking"]["model"] = {
        "generator": {"kind": "fgcnn", "maps": [2], "heights": [2], "pools": [2], "new_maps": [1]}
    }
    load_recipe(write(tmp_path, data))


def test_what_needs_gpus_is_valid_where_the_recipe_uses_them(tmp_path: Path) -> None:
    data = changed("embedding.optimizer", {"kind": "adam", "weight_decay": 0.1})
    data["embedding"]["sharding"] = {"communication": "bf16"}

    assert load_recipe(write(tmp_path, data), ["cluster.use_gpu=true"]).cluster.use_gpu


@pytest.mark.parametrize(
    ("gpus", "use_gpu", "remedy"),
    [
        (0.5, "true", "gpus_per_actor to 1"),
        (0, "true", "gpus_per_actor to 1"),
        (1, "false", "to 0"),
    ],
)
def test_a_direct_transport_that_devices_do_not_allow_is_refused(
    gpus: float, use_gpu: str, remedy: str
) -> None:
    content = "content={text: {max_tokens: 8}, dim: 16, placement: {kind: service, transport: %s"
    overrides = [f"cluster.use_gpu={use_gpu}", content % f"direct, gpus_per_actor: {gpus}}}}}"]
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    said = str(caught.value)
    assert "content.placement.transport=direct" in said
    assert f"cluster.use_gpu={use_gpu}" in said
    assert f"gpus_per_actor={gpus:g}" in said
    assert remedy in said
    overrides[1] = overrides[1].replace("direct", "auto")
    assert load_recipe("demo", overrides).content is not None


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    data = changed("nmae", 1)
    data["gaet"] = 2

    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, data))

    assert "nmae" in str(caught.value)
    assert "did you mean 'gate'" in str(caught.value)


def test_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'demo'"):
        load_recipe("demp")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.task", "path.to.key=value"),
        ("features.tables.itm.embedding_dim=8", "did you mean 'item'"),
        ("name.first=x", "nothing lies below|is a value"),
        ("name+=x", "name is no list"),
        ("+=x", "path.to.key=value"),
    ],
)
def test_bad_override_says_how_to_write_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, SMALL), [override])


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: a\n  b: [1\n")

    with pytest.raises(UserError, match="line 2"):
        load_recipe(str(path))


def test_the_example_of_the_training_guide_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    example = yaml.safe_load(text.split("```yaml")[1].split("```")[0])

    assert WindowConfig.model_validate(example["window"]).validation_days == 1
    assert EmbeddingPlaneConfig.model_validate(example["embedding"]).l2 > 0
    assert RankingConfig.model_validate(example["ranking"]).tasks[1].after == "click"


def test_names_that_modules_cannot_have_are_those_of_this_pytorch() -> None:
    modules = torch.nn.ModuleDict()
    public = {name for name in dir(modules) if not name.startswith("_")}
    # Other libraries hang methods of their own onto modules.
    own = {n for n in public if getattr(getattr(modules, n), "__module__", "torch")[:5] == "torch"}
    assert own
    assert own <= TAKEN_NAMES


def test_a_task_has_the_row_weights_of_the_task_before_it() -> None:
    tasks = (
        TaskConfig(name="click", sample_weight="kept"),
        TaskConfig(name="cart", after="click"),
        TaskConfig(name="buy", after="cart", sample_weight="value"),
        TaskConfig(name="refund", after="buy"),
        TaskConfig(name="like"),
    )
    assert RankingConfig(tasks=tasks).sample_weights == {
        "click": "kept",
        "cart": "kept",
        "buy": "value",
        "refund": "value",
    }


def test_a_plan_is_made_anew_when_the_model_makes_rows_wider() -> None:
    shared = load_recipe("avazu", ["ranking.model.generator.embeddings=shared"])
    none = load_recipe("avazu", ["ranking.model.generator=null"])
    deeper = load_recipe("avazu", ["ranking.model.classifier.hidden=[64]"])
    assert plan_config(load_recipe("avazu")) == plan_config(deeper) != plan_config(shared)
    assert plan_config(shared) == plan_config(none)

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.config import SyntheticConfig
from pipeline.data_cli import data_app
from pipeline.marketplace.synthetic import RECEIPT, generate
from pipeline.recipe import load_recipe, recipe_names

BUILT_IN = ["avazu", "cluster", "criteo", "demo", "frappe", "movielens", "movielens_content"]


def test_synth_writes_what_a_recipe_of_the_same_sizes_expects(tmp_path: Path) -> None:
    out = tmp_path / "x"
    sizes = ["--days", "2", "--users", "60", "--items", "50", "--events-per-day", "200"]
    result = CliRunner().invoke(
        data_app, ["synth", "--out", str(out), *sizes, "--set", "drift=0.3"]
    )
    assert result.exit_code == 0, result.output
    assert "400" in result.output
    receipt = (out / RECEIPT).read_text()
    config = SyntheticConfig(num_days=2, num_users=60, num_items=50, events_per_day=200, drift=0.3)
    generate(config, out)  # the same marketplace: nothing to do, nothing to refuse
    assert (out / RECEIPT).read_text() == receipt


def test_import_prints_one_table_of_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "u.data").write_text("1\t2\t4\t874713600\n2\t3\t1\t874713700\n")
    out = tmp_path / "out"
    arguments = ["import", "movielens", "--src", str(tmp_path / "src"), "--out", str(out)]
    result = CliRunner().invoke(data_app, [*arguments, "--negatives", "1"])
    assert result.exit_code == 0, result.output
    cells = {line[:20].strip().split("  ")[0]: line.split() for line in result.output.splitlines()}
    assert cells["events"][-1] == "4"
    assert cells["like = 1"][3] == "50.00%"
    assert (out / "events" / "dt=1997-09-20").is_dir()


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_recipes_are_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 20 < len(recipe.description) < 100


def test_all_built_in_recipes_are_known() -> None:
    assert recipe_names() == BUILT_IN


def test_demo_day_can_be_evaluated_on_the_day_after() -> None:
    synthetic = load_recipe("demo").data.synthetic
    assert synthetic is not None
    assert (synthetic.first_day, synthetic.num_days) == (date(2024, 1, 1), 8)
    # `braid data synth` with its defaults writes the demo's marketplace.
    assert synthetic == SyntheticConfig(num_days=8)


def test_recipe_columns_exist_in_the_data(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    generate(
        SyntheticConfig(num_days=1, events_per_day=50, num_users=20, num_items=20), tmp_path / "x"
    )
    paths = {
        "events": next((tmp_path / "x" / "events").rglob("*.parquet")),
        "items": tmp_path / "x" / "items.parquet",
        "users": tmp_path / "x" / "users.parquet",
    }
    columns = {source: set(pq.read_schema(path).names) for source, path in paths.items()}
    for name in ("demo", "cluster"):
        features = load_recipe(name).features
        for feature in (*features.sparse, *features.dense, *features.sequences):
            if feature.source != "gap":
                assert feature.column_name in columns[feature.source], (name, feature.name)


def test_recipes_are_plain_yaml_without_tabs_or_anchors() -> None:
    for path in sorted((Path(__file__).parents[2] / "pipeline" / "recipes").glob("*.yaml")):
        text = path.read_text()
        assert "\t" not in text
        assert "&" not in text
        assert isinstance(yaml.safe_load(text), dict)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, pipeline.data_cli; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "ray", "pyarrow", "numpy", "pandas", "pydantic"]
    result = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

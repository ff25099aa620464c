"""The guide's blocks, run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Recipe
from pipeline.study import read_variants

ROOT = Path(__file__).parents[1]
MAX_LINES = 30

STEP = """
import torch
from pathlib import Path
from embedding.loader import SampleFiles
from ranking.config import RankingConfig
from tests.ranking.harness import Harness
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

path = Path("samples.parquet")
write_samples(path)
data = small_config(epochs=1).model_dump()
for generator in (None, {"maps": [2], "heights": [2], "pools": [2], "new_maps": [1]}):
    data["model"] |= {"classifier": {"kind": "gated", "hidden": [8]}, "generator": generator}
    harness = Harness(
        SampleFiles([path], SCHEMA, [task.name for task in TASKS]),
        RankingConfig.model_validate(data),
    )
    gate = harness.model.ranker.classifier.gate.weight
    before = gate.detach().clone()
    harness.fit()
    assert not gate.equal(before)
    assert gate.isfinite().all()
"""


def block(name: str) -> str:
    text = (ROOT / "docs" / "extend.md").read_text()
    found = re.findall(rf"```\w+ {name}\n(.*?)```", text, re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def demo_with(addition: dict[str, Any]) -> Recipe:
    """The demo recipe with a block's list entries appended."""
    recipe = yaml.safe_load((ROOT / "pipeline" / "recipes" / "demo.yaml").read_text())
    for section, parts in addition.items():
        for part, entries in parts.items():
            recipe[section][part] += entries
    return Recipe.model_validate(recipe)


def test_feature_block_adds_a_table_and_a_column() -> None:
    features = demo_with(yaml.safe_load(block("feature"))).features

    assert features.sparse[-1].column_name == "city"
    assert features.table("city").num_embeddings == 10001


def test_task_block_adds_a_post_click_task() -> None:
    task = demo_with(yaml.safe_load(block("task"))).ranking.tasks[-1]

    assert (task.label_name, task.weight, task.after) == ("bought", 2.0, "click")


def test_variants_block_is_a_variants_file(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(block("variants"))

    assert [v.name for v in read_variants(path)] == ["dnn", "gated", "gated_fgcnn"]


@pytest.mark.integration
def test_model_blocks_make_a_classifier_that_trains(tmp_path: Path) -> None:
    lines = sum(block(name).count("\n") for name in ("config", "module", "case"))
    assert lines <= MAX_LINES + 5, "imports and blank lines included"
    for package in ("embedding", "ranking", "pipeline", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    insert(tmp_path / "ranking/classifier_config.py", "Classifier = Annotated[", block("config"))
    replace(
        tmp_path / "ranking/classifier_config.py", "    | FinalMlp,", "    | FinalMlp\n    | Gated,"
    )
    replace(
        tmp_path / "ranking/classifier_config.py", "DcnV2, FinalMlp)", "DcnV2, FinalMlp, Gated)"
    )
    (tmp_path / "ranking/classifiers/gated.py").write_text(block("module"))
    build = tmp_path / "ranking/classifiers/build.py"
    replace(build, "import deep, maps", "import deep, gated, maps")
    replace(build, "    match settings:\n", "    match settings:\n" + block("case"), count=1)

    done = subprocess.run(
        [sys.executable, "-c", STEP],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def insert(path: Path, before: str, text: str) -> None:
    replace(path, before, f"{text}\n\n{before}")


def replace(path: Path, old: str, new: str, count: int = -1) -> None:
    content = path.read_text()
    assert old in content, old
    path.write_text(content.replace(old, new, count))

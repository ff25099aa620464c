"""The guide's blocks, applied as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Recipe

ROOT = Path(__file__).parents[1]
CHANGED = ("ranking/classifier_config.py", "ranking/classifiers/build.py")
NEW = "ranking/classifiers/gated.py"
MAX_LINES = 50

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
VARIANTS = """
from pathlib import Path
from pipeline.recipe import load_recipe
from pipeline.study.study import read_variants

for variant in read_variants(Path("variants.yaml")):
    model = load_recipe("demo", variant.overrides).ranking.model
    print(variant.name, model.classifier.kind, model.generator is not None)
"""


def block(name: str) -> str:
    text = (ROOT / "docs" / "extend.md").read_text()
    found = re.findall(rf"```\w+ {re.escape(name)}\n(.*?)```", text, re.DOTALL)
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


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code in which the guide's steps for a model were taken."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("embedding", "multimodal", "ranking", "pipeline", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    for name in CHANGED:
        apply(block(name), folder / name)
    (folder / NEW).write_text(block(NEW))
    (folder / "variants.yaml").write_text(block("variants"))
    return folder


def test_a_model_takes_few_lines() -> None:
    assert sum(block(name).count("\n") for name in (*CHANGED, NEW)) <= MAX_LINES


@pytest.mark.integration
def test_model_blocks_make_a_classifier_that_trains(extended: Path) -> None:
    run(STEP, extended)


def test_variants_are_recipes_with_the_new_model(extended: Path) -> None:
    said = run(VARIANTS, extended)

    expected = ["dcn_v2 dcn_v2 False", "gated gated False", "gated_fgcnn gated True"]
    assert said.splitlines() == expected


def run(code: str, folder: Path) -> str:
    """What a process says that imports from a copy of the code."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def apply(diff: str, path: Path) -> None:
    """Make the changes of a diff; each of its parts must name one place."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        content = path.read_text()
        assert content.count(old) == 1, old
        path.write_text(content.replace(old, new))

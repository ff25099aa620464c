"""The study of cold apps by their texts: the command of its file, and its variants."""

import re
import shlex
from pathlib import Path

import pytest

from multimodal.content_config import ConcatFusion
from pipeline.recipe import load_recipe
from pipeline.study.study import read_variants

ROOT = Path(__file__).parents[2]
FRAPPE = ROOT / "benchmarks" / "frappe_content_variants.yaml"


@pytest.fixture(scope="module")
def command() -> list[str]:
    """Words of the `braid study` that the file's header gives."""
    header = re.sub(r"^# ?", "", FRAPPE.read_text(), flags=re.MULTILINE)
    found = re.search(r"braid study (?:.*\\\n)+.*", header)
    assert found is not None
    return shlex.split(found.group().replace("\\\n", " "))


def after(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == option]


def test_cold_apps_are_studied_with_the_command_that_the_variants_file_gives(
    command: list[str],
) -> None:
    assert after(command, "--recipe") == ["frappe"]
    assert [ROOT / name for name in after(command, "--variants")] == [FRAPPE]
    recipes = {
        variant.name: load_recipe("frappe", [*after(command, "--set"), *variant.overrides])
        for variant in read_variants(FRAPPE)
    }
    assert list(recipes) == ["ids", "frozen-concat", "full"]
    for recipe in recipes.values():
        held_out = recipe.evaluation.held_out_items
        assert held_out is not None
        assert held_out.share == 0.2
    assert recipes["ids"].content is None
    frozen, full = recipes["frozen-concat"].content, recipes["full"].content
    assert frozen is not None
    assert full is not None
    assert list(frozen.towers) == list(full.towers) == ["text"]
    assert frozen.frozen
    assert isinstance(frozen.fusion, ConcatFusion)
    assert frozen.cic is None
    assert full.text is not None
    assert full.text.layers_in_step == 2
    assert full.cic is not None

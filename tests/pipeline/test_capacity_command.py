"""`braid capacity` through the command line, on a Ray of its own: answer, JSON and report."""

from pathlib import Path

import pytest
import yaml

from deploy.app import main
from pipeline.capacity_types import CapacityAnswer
from tests.pipeline.small_log import make_recipe

pytestmark = pytest.mark.integration


def test_a_small_sweep_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path).model_dump(mode="json")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    json_file, report = tmp_path / "capacity.json", tmp_path / "capacity.html"
    sweep = ("-t", "h200:1..2x8", "-t", "l40s:4", "--growth", "1", "--growth", "1000000")
    options = ("--rows-per-s", "1000", "--price", "h200=80", "--growth-per-day", "0.01")
    command = ["capacity", "--recipe", str(tmp_path / "small.yaml"), *sweep, *options]

    code = main([*command, "--json", str(json_file), "--report", str(report)])

    assert code == 0
    answer = CapacityAnswer.model_validate_json(json_file.read_text())
    assert [(p.topology, p.growth) for p in answer.points] == [
        ("h200:8", 1.0),
        ("h200:8", 1e6),
        ("h200:2x8", 1.0),
        ("h200:2x8", 1e6),
        ("l40s:4", 1.0),
        ("l40s:4", 1e6),
    ]
    # Priced clusters are compared by price, the unpriced one by nothing.
    assert answer.chosen is not None
    assert answer.chosen.topology == "h200:8"
    assert answer.dense.flops_per_row > 0
    assert answer.dense.parameters > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert answer.answer in shown
    assert answer.answer.split(".")[0] in report.read_text()

"""`braid capacity` through the command line, on Ray: answer, JSON and report."""

from pathlib import Path

import pytest
import yaml

from deploy.app import main
from pipeline.capacity.types import CapacityAnswer
from tests.pipeline.small_log import make_recipe

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("shared_ray")]


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
    # Priced clusters are compared by price, the unpriced one by nothing, which the answer says.
    assert answer.chosen is not None
    assert answer.chosen.topology == "h200:8"
    assert "h200:8 is the cheapest of the clusters with a price" in answer.answer
    assert "l40s has no price" in answer.answer
    assert answer.dense.flops_per_row > 0
    assert answer.dense.parameters > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert answer.answer in shown
    assert answer.answer.split(".")[0] in report.read_text()
    assert f"braid plan -r {tmp_path / 'small.yaml'} -t h200:8 --batch" in report.read_text()


CONTENT = "content={text: {max_tokens: 8}, dim: 16, gradient: {max_items_per_step: 64}}"


def test_content_is_part_of_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, report = tmp_path / "capacity.json", tmp_path / "capacity.html"
    recipe = ("-r", "demo", "--set", CONTENT, "--set", f"data.root={tmp_path}")
    sweep = ("-t", "h100:8", "-t", "cpu:2", "--dense-flops-per-row", "1e6")

    code = main(["capacity", *recipe, *sweep, "--json", str(json_file), "--report", str(report)])

    assert code == 0
    answer = CapacityAnswer.model_validate_json(json_file.read_text())
    assert answer.content is not None
    assert answer.dense.flops_per_row == 1e6
    assert answer.dense.parameters > 0
    for point in answer.points:
        parts = (point.sparse_s or 0) + (point.dense_s or 0) + (point.content_s or 0)
        assert point.step_s == pytest.approx(parts - (point.hidden_s or 0))
        assert (point.content_items or 0) > 64
    on_cpu = answer.points[1]
    encoder = answer.content.encoder
    assert on_cpu.content_s is not None
    assert on_cpu.content_s > 32 * (encoder.forward_s + encoder.backward_s)
    assert " ms content" in " ".join(capsys.readouterr().out.split())
    assert "Of it content" in report.read_text()


def test_a_missing_tower_ends_the_command_with_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = ["--set", "content.text={}", "--set", "content.image.model=./nowhere"]
    code = main(["capacity", "-r", "movielens_content", *nowhere, "-t", "h100:8"])
    assert code == 2
    said = capsys.readouterr().err
    assert "content.image: planning counts the tower from its files" in " ".join(said.split())

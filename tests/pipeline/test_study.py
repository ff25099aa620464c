"""A study's statistics by hand, and its trials against the same stages of a day's run."""

import json
from pathlib import Path

import pytest
import yaml
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from deploy.app import main
from embedding.errors import UserError
from pipeline.study import read_variants
from pipeline.study_statistics import differences, estimates


def test_interval_of_three_seeds_is_students() -> None:
    trials = {0: {"click.auc": 0.1}, 1: {"click.auc": 0.2}, 2: {"click.auc": 0.3}}

    found = estimates(trials)["click.auc"]

    assert found.mean == pytest.approx(0.2)
    # Standard deviation 0.1; 97.5% quantile of t with 2 degrees of freedom: 4.302653.
    assert found.ci95 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found.values == (0.1, 0.2, 0.3)


def test_differences_are_paired_by_seed() -> None:
    first = {0: {"auc": 0.5}, 1: {"auc": 0.7}, 2: {"auc": 0.9}}
    other = {2: {"auc": 0.93}, 0: {"auc": 0.51}}  # seed 1 failed

    found = differences(other, first)["auc"]

    assert found.diff == pytest.approx(0.02)
    # Differences 0.03 and 0.01: standard deviation 0.0141421; t with 1 degree: 12.706205.
    assert found.ci95 == pytest.approx(12.706205 * 0.0141421 / 2**0.5, rel=1e-5)
    assert not found.sure


def test_one_seed_has_no_interval() -> None:
    assert estimates({3: {"auc": 0.6}})["auc"].ci95 is None
    assert differences({3: {"auc": 0.6}}, {3: {"auc": 0.5}})["auc"].ci95 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names to lists"),
        ("a: {b: 1}", "'a' must be a list"),
        ("a/b: []", "'a/b' names a directory"),
        ("a: [", "not valid YAML"),
    ],
)
def test_variants_of_another_shape_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=message):
        read_variants(path)


@pytest.mark.integration
def test_trial_equals_the_stages_of_a_day_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (0, 1):
        rows = [
            event(day, 1 + i % 5, 60 * i, item_id=1 + i % 4, click=int(i % 5 < 2))
            for i in range(90)
        ]
        write_day(root, day, [rows])
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["cluster"]["num_workers"] = 1
    recipe["ranking"]["trainer"] |= {"batch_size_per_rank": 16, "seed": 5, "epochs": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    wide = 'wide: ["ranking.model.classifier={kind: dnn, hidden: [64]}"]'
    (tmp_path / "variants.yaml").write_text(f"plain: []\n{wide}\n")
    common = ["--recipe", str(tmp_path / "small.yaml"), "--date", DAYS[0]]
    variants = ["--variants", str(tmp_path / "variants.yaml"), "--seeds", "2"]
    study = ["study", *common, *variants, "--out", str(tmp_path / "study")]

    assert main([*study, "--json", str(tmp_path / "study.json")]) == 0, capsys.readouterr()
    assert main(["stage", "evaluate", *common, "--out", str(tmp_path / "day")]) == 0

    trial = tmp_path / "study" / "trials" / "plain" / "seed-5"
    alone = tmp_path / "day" / DAYS[0] / "evaluate"
    assert (trial / "metrics.json").read_text() == (alone / "metrics.json").read_text()
    result = json.loads((tmp_path / "study.json").read_text())
    assert list(result["variants"]) == ["plain", "wide"]
    values = result["variants"]["plain"]["click.auc"]["values"]
    assert values[0] == json.loads((trial / "metrics.json").read_text())["tasks"]["click"]["auc"]
    assert values[0] != values[1]
    assert list(result["paired"]) == ["wide"]
    assert "wide" in (tmp_path / "study" / "study.html").read_text()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    assert main(study) == 0
    assert "4 of them done before" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")} == finished

"""A warm-started training that made nothing better: what is published, and what is trained next."""

import json
from pathlib import Path

import pytest
import yaml

from deploy.app import main
from pipeline.lineage import start_of_next_run
from tests.one_process import in_one_process
from tests.pipeline.small_log import DAYS, make_recipe, write_days_to_train_on

pytestmark = pytest.mark.integration


def test_days_that_taught_nothing_are_trained_on_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out, path = tmp_path / "data", tmp_path / "out", tmp_path / "small.yaml"
    write_days_to_train_on(root, 4)
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["cluster"]["num_workers"] = 1
    recipe["window"]["validation_days"] = 1
    recipe["ranking"]["trainer"]["validation"]["metric"] = "logloss"
    recipe["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0]}
    path.write_text(yaml.safe_dump(recipe))

    def run(day: int, *settings: str) -> None:
        words = ["--recipe", str(path), "--date", DAYS[day], "--out", str(out)]
        assert main(["run", *words, *(f"--set={setting}" for setting in settings)]) == 0

    with in_one_process():
        run(1)
        # Steps so large that every one of them makes the model worse.
        run(2, "ranking.trainer.dense_optimizer.learning_rate=20")

    first, second = (
        json.loads((out / DAYS[day] / "train" / "manifest.json").read_text())["facts"]
        for day in (1, 2)
    )
    assert second["result"]["best_step"] == 0
    assert second["result"]["checkpoint"] == "step-00000000"
    assert second["days"] == first["days"] == [DAYS[0]]
    assert second["day_files"] == first["day_files"]
    said = f"so its result is that model; later runs train on {DAYS[1]} again"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in json.loads((out / DAYS[2] / "summary.json").read_text())["warnings"][0]
    started = f"the next run starts from the model of {DAYS[2]} and trains on the days after"
    assert start_of_next_run(out) == f"{started} {DAYS[0]}"

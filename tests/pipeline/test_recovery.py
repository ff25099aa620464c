"""Kill -9 of a worker and of the driver: the finished run equals the undisturbed one.

The run validates, averages its weights and changes its learning rates, so all of that must resume;
what it publishes is looked at, too.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.pipeline.interrupted import (
    DATE,
    Run,
    assert_bundle_scores_what_was_evaluated,
    metrics,
    processes,
)

STEPS_BETWEEN_CHECKPOINTS = 10

pytestmark = pytest.mark.integration


def run_on(data: Path) -> Run:
    return Run(
        {
            "data.root": data,
            "data.synthetic.num_days": 4,
            "data.synthetic.events_per_day": 4500,
            "data.synthetic.num_items": 200,
            "data.synthetic.num_users": 400,
            "ranking.trainer.batch_size_per_rank": 128,
            "ranking.trainer.log_every_steps": 5,
            "ranking.trainer.checkpoint_every_steps": STEPS_BETWEEN_CHECKPOINTS,
            "window.validation_days": 1,
            "ranking.trainer.validation": "{every_steps: 12, metric: logloss, patience: 6}",
            "ranking.trainer.ema_decay": 0.95,
            "ranking.trainer.schedule": (
                "{warmup_steps: 20, decay: {kind: cosine, final_factor: 0.1}, "
                "plateau: {factor: 0.8}}"
            ),
            "embedding.l2": 1e-5,
            "gate": "{task: click, min_auc: 0, calibration: [0, 100]}",
            # The batches around a restart take part in dropout and managed collision, too.
            "features.tables.user.ids.kind": "managed_collision",
        }
    )


def validations(out: Path) -> list[tuple[int, float]]:
    """Step and logloss of every validation."""
    lines = (out / DATE / "train" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    key = "validation/click/logloss"
    return [(record["step"], record[key]) for record in records if key in record]


def kill_a_worker(driver: psutil.Process) -> None:
    workers = processes(driver, "RayTrainWorker")
    assert len(workers) == 2
    random.choice(workers).kill()


def kill_the_driver(driver: psutil.Process) -> None:
    driver.kill()


def press_ctrl_c(driver: psutil.Process) -> None:
    driver.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and an output directory where everything before training has run."""
    root = tmp_path_factory.mktemp("recovery")
    run_on(root / "data").up_to("plan", root / "prepared")
    return root / "data", root / "prepared"


@pytest.fixture(scope="module")
def undisturbed(prepared: tuple[Path, Path]) -> Path:
    """Output directory of a run that published; its ranks are forked here, without Ray."""
    data, before_training = prepared
    out = before_training.with_name("undisturbed")
    shutil.copytree(before_training, out)
    run_on(data).up_to("publish", out)
    return out


def test_killed_worker_and_killed_driver_change_nothing(
    prepared: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    data, before_training = prepared
    out = tmp_path / "out"
    shutil.copytree(before_training, out)
    worker_step = random.randrange(STEPS_BETWEEN_CHECKPOINTS + 5, 28)
    driver_step = random.randrange(33, 48)

    code = run_on(data).interrupt(out, {worker_step: kill_a_worker, driver_step: kill_the_driver})
    text = (out / "output.txt").read_text()
    assert code == -9, text
    assert text.count("workers restarted") == 1, text
    run_on(data).train(out)
    run_on(data).up_to("evaluate", out)

    steps = f"worker at {worker_step}, driver at {driver_step}"
    assert metrics(out) == metrics(undisturbed), steps
    assert validations(out) == validations(undisturbed), steps


def test_one_interrupt_ends_a_training_and_its_command_with_130(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    """Code 0 would say that the model was published."""
    data, before_training = prepared
    out = tmp_path / "out"
    shutil.copytree(before_training, out)

    code = run_on(data).interrupt(out, {15: press_ctrl_c})
    text = (out / "output.txt").read_text()
    assert code == 130, text
    assert "Traceback" not in text


def test_the_best_validated_weights_are_published(undisturbed: Path) -> None:
    result = json.loads((undisturbed / DATE / "train" / "result.json").read_text())
    losses = dict(validations(undisturbed))
    best = min(losses, key=losses.__getitem__)
    assert result["best_step"] == best
    assert result["checkpoint"] == f"step-{best:08d}"
    assert [path.name for path in (undisturbed / DATE / "train" / "checkpoint").iterdir()] == [
        result["checkpoint"]
    ]


def test_a_bundle_scores_what_was_evaluated(undisturbed: Path, tmp_path: Path) -> None:
    assert_bundle_scores_what_was_evaluated(undisturbed, tmp_path)

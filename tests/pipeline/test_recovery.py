"""Kill -9 of a worker and of the driver: the finished run equals the undisturbed one."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

DATE = "2024-01-03"
TIMEOUT_S = 300
STEPS_BETWEEN_CHECKPOINTS = 10

pytestmark = pytest.mark.integration


def command(data: Path, out: Path, *, stage: str) -> list[str]:
    settings = {
        "data.root": data,
        "data.synthetic.num_days": 4,
        "data.synthetic.events_per_day": 8000,
        "data.synthetic.num_items": 200,
        "data.synthetic.num_users": 400,
        "ranking.trainer.batch_size_per_rank": 128,
        "ranking.trainer.log_every_steps": 5,
        "ranking.trainer.checkpoint_every_steps": STEPS_BETWEEN_CHECKPOINTS,
        # The batches around a restart take part in dropout and managed collision, too.
        "features.tables.user.ids.kind": "managed_collision",
    }
    overrides = [f"--set={key}={value}" for key, value in settings.items()]
    code = "import sys; from deploy.app import main; sys.exit(main())"
    run = [sys.executable, "-c", code, "stage", stage, "--recipe", "demo", "--date", DATE]
    return [*run, "--out", str(out), *overrides]


def finish(data: Path, out: Path, *, stage: str = "evaluate") -> None:
    done = subprocess.run(
        command(data, out, stage=stage),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(out: Path) -> object:
    return json.loads((out / DATE / "evaluate" / "metrics.json").read_text())


def logged_step(out: Path) -> int:
    path = out / DATE / ".train.partial" / "resume" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def interrupt(data: Path, out: Path, step: int, kill: Callable[[psutil.Process], None]) -> int:
    """Start the run, `kill` something when it has logged `step`, and wait for its end."""
    log = out / "output.txt"
    with log.open("w") as output:
        driver = subprocess.Popen(
            command(data, out, stage="evaluate"), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        started = time.monotonic()
        while logged_step(out) < step:
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() - started < TIMEOUT_S
            time.sleep(0.02)
        kill(psutil.Process(driver.pid))
        return driver.wait(TIMEOUT_S)
    finally:
        driver.kill()
        driver.wait()


def kill_a_worker(driver: psutil.Process) -> None:
    workers = [
        child
        for child in driver.children(recursive=True)
        if any("RayTrainWorker" in part for part in child.cmdline())
    ]
    assert len(workers) == 2
    random.choice(workers).kill()


def kill_the_driver(driver: psutil.Process) -> None:
    driver.kill()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and an output directory where everything before training has run."""
    root = tmp_path_factory.mktemp("recovery")
    finish(root / "data", root / "prepared", stage="plan")
    return root / "data", root / "prepared"


def test_killed_worker_and_killed_driver_change_nothing(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    data, before_training = prepared
    outs = {name: tmp_path / name for name in ("undisturbed", "worker", "driver")}
    for out in outs.values():
        shutil.copytree(before_training, out)
    step = random.randrange(STEPS_BETWEEN_CHECKPOINTS + 5, 60)

    finish(data, outs["undisturbed"])
    code = interrupt(data, outs["worker"], step, kill_a_worker)
    assert code == 0, (step, (outs["worker"] / "output.txt").read_text())
    code = interrupt(data, outs["driver"], step, kill_the_driver)
    assert code == -9
    finish(data, outs["driver"])

    assert metrics(outs["worker"]) == metrics(outs["undisturbed"]), f"step {step}"
    assert metrics(outs["driver"]) == metrics(outs["undisturbed"]), f"step {step}"

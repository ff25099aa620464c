"""A training that tests interrupt and let finish, in a process of its own, and stages around it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from deploy.app import main
from deploy.predictor import Predictor
from deploy.scoring import sample_files, score_samples
from pipeline.evaluate import read_predictions
from tests.one_process import in_one_process

DATE, NEXT_DATE = "2024-01-03", "2024-01-04"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Run:
    """The demo recipe with other settings; `data.root` is one of them."""

    settings: Mapping[str, object]

    def words(self, out: Path, stage: str) -> list[str]:
        overrides = [f"--set={key}={value}" for key, value in self.settings.items()]
        return ["stage", stage, "--recipe", "demo", "--date", DATE, "--out", str(out), *overrides]

    def command(self, out: Path) -> list[str]:
        code = "import sys; from deploy.app import main; sys.exit(main())"
        return [sys.executable, "-c", code, *self.words(out, "train")]

    def up_to(self, stage: str, out: Path) -> None:
        """Stages that nobody interrupts, without Ray."""
        with in_one_process():
            assert main(self.words(out, stage)) == 0

    def train(self, out: Path) -> None:
        """What is left of the training, on Ray."""
        done = subprocess.run(
            self.command(out), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def interrupt(self, out: Path, kills: Mapping[int, Callable[[psutil.Process], None]]) -> int:
        """Start training, kill something whenever one of the steps is logged, wait for the end."""
        log = out / "output.txt"
        with log.open("w") as output:
            driver = subprocess.Popen(self.command(out), stdout=output, stderr=subprocess.STDOUT)
        try:
            started = time.monotonic()
            for step, kill in sorted(kills.items()):
                while _logged_step(out) < step:
                    assert driver.poll() is None, log.read_text()
                    assert time.monotonic() - started < TIMEOUT_S
                    time.sleep(0.02)
                kill(psutil.Process(driver.pid))
            return driver.wait(TIMEOUT_S)
        finally:
            driver.kill()
            driver.wait()


def assert_bundle_scores_what_was_evaluated(published: Path, scratch: Path) -> None:
    """The bundle of a run scores the evaluated samples as the trainer did."""
    samples = published / NEXT_DATE / "join" / "samples" / f"dt={NEXT_DATE}"
    scores = scratch / "scores.parquet"
    bundle = published / DATE / "publish" / "bundle"
    score_samples(
        Predictor(bundle),
        sample_files(samples),
        scores,
        batch_size=512,
        progress=lambda *_: None,
    )
    scored = pq.read_table(scores)
    predicted = read_predictions(published / DATE / "evaluate" / "predictions")
    for key in ("key:request_id", "key:item_id"):
        assert scored[key].equals(predicted[key])
    found, expected = (t["probability:click"].to_numpy() for t in (scored, predicted))
    # Other batch sizes sum float32 products in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def processes(driver: psutil.Process, name: str) -> list[psutil.Process]:
    """Those below the driver whose command line has `name` in it."""
    return [
        child
        for child in driver.children(recursive=True)
        if any(name in part for part in child.cmdline())
    ]


def metrics(out: Path) -> object:
    return json.loads((out / DATE / "evaluate" / "metrics.json").read_text())


def _logged_step(out: Path) -> int:
    path = out / DATE / ".train.partial" / "resume" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

"""Kill -9 of a content actor and of a rank: the finished run equals the undisturbed one."""

import json
import random
import shutil
from collections.abc import Callable
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

pytestmark = pytest.mark.integration

STEPS_BETWEEN_CHECKPOINTS = 10


def run_on(data: Path, transport: str) -> Run:
    return Run(
        {
            "data.root": data,
            "data.synthetic.num_days": 4,
            "data.synthetic.events_per_day": 3000,
            "data.synthetic.num_items": 100,
            "data.synthetic.num_users": 200,
            "ranking.trainer.batch_size_per_rank": 128,
            "ranking.trainer.log_every_steps": 5,
            "ranking.trainer.checkpoint_every_steps": STEPS_BETWEEN_CHECKPOINTS,
            "gate": "{task: click, min_auc: 0, calibration: [0, 100]}",
            "content": (
                "{text: {max_tokens: 8}, image: {image_size: 16}, dim: 16, "
                "gradient: {max_items_per_step: 40}, fusion: {kind: fq_former, dropout: 0.1}, "
                "placement: {kind: service, num_actors: 2, timeout_s: 120, cpus_per_actor: 0.5, "
                f"transport: {transport}}}}}"
            ),
        }
    )


def kill_one_of(name: str) -> Callable[[psutil.Process], None]:
    def kill(driver: psutil.Process) -> None:
        found = processes(driver, name)
        assert len(found) == 2, [process.cmdline() for process in found]
        random.choice(found).kill()

    return kill


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and an output directory where everything before training has run."""
    root = tmp_path_factory.mktemp("content-recovery")
    run_on(root / "data", "object_store").up_to("plan", root / "prepared")
    return root / "data", root / "prepared"


@pytest.fixture(scope="module")
def undisturbed(prepared: tuple[Path, Path]) -> Path:
    """Output directory of a run that nothing was killed in."""
    data, before_training = prepared
    out = before_training.with_name("undisturbed")
    shutil.copytree(before_training, out)
    run = run_on(data, "object_store")
    run.train(out)
    run.up_to("evaluate", out)
    return out


@pytest.fixture(scope="module", params=["object_store", "direct"])
def killed(request: pytest.FixtureRequest, prepared: tuple[Path, Path]) -> Path:
    """Output directory of a run that lost an actor, then a rank, and published."""
    data, before_training = prepared
    out = before_training.with_name(f"killed-{request.param}")
    shutil.copytree(before_training, out)
    actor_step = random.randrange(STEPS_BETWEEN_CHECKPOINTS + 5, 25)
    rank_step = random.randrange(STEPS_BETWEEN_CHECKPOINTS + 25, 50)
    kills = {actor_step: kill_one_of("ContentActor"), rank_step: kill_one_of("RayTrainWorker")}
    run = run_on(data, request.param)
    code = run.interrupt(out, kills)
    text = (out / "output.txt").read_text()
    assert code == 0, text
    assert text.count("workers restarted") == len(kills), f"{[*kills]}: {text}"
    run.up_to("publish", out)
    return out


def test_a_killed_actor_and_a_killed_rank_change_nothing(killed: Path, undisturbed: Path) -> None:
    """Nor does the way in which tensors travel."""
    assert metrics(killed) == metrics(undisturbed)


def test_training_reports_gradients_age_and_cost_of_content(killed: Path) -> None:
    result = json.loads((killed / DATE / "train" / "result.json").read_text())
    found = result["content"]
    for part in ("tower", "fusion", "heads"):
        assert found[f"content/gradient_norm_{part}"] > 0
    assert 0 < found["content/encoded_items"] <= 80
    assert found["content/encoded_items"] < 2 * found["content/distinct_items_per_rank"]
    assert found["content/bank_age_steps"] > 0
    assert found["content/seconds_per_step"] > 0


def test_a_bundle_scores_what_was_evaluated(killed: Path, tmp_path: Path) -> None:
    assert_bundle_scores_what_was_evaluated(killed, tmp_path)

from pathlib import Path

from pipeline.artifacts import Manifest
from pipeline.config import GateConfig
from pipeline.gate import gate
from pipeline.metrics_file import METRICS_FILE, write_metrics
from pipeline.registry import PublishedModel
from ranking.evaluation import TaskMetrics
from tests.pipeline.small_log import make_recipe


def folder_with_auc(path: Path, auc: float) -> Path:
    path.mkdir(parents=True)
    metrics = TaskMetrics(num_rows=10, auc=auc, calibration=1.0)
    write_metrics({"click": metrics}, path / METRICS_FILE)
    return path


def decide(tmp_path: Path, new: float, old: float | None) -> tuple[bool, str]:
    recipe = make_recipe(tmp_path).model_copy(
        update={"gate": GateConfig(task="click", max_auc_drop=0.02)}
    )
    current = None
    if old is not None:
        current = PublishedModel(
            date="2024-01-01",
            directory=folder_with_auc(tmp_path / "models" / "a", old),
            manifest=Manifest(stage="publish", artifact_id="a", config_hash="c"),
        )
    scratch = tmp_path / "scratch"
    scratch.mkdir(parents=True)
    facts = gate(recipe, folder_with_auc(tmp_path / "evaluate", new), current, scratch).facts
    return facts["passed"], " ".join(facts["reasons"])


def test_a_model_is_compared_with_the_metrics_that_were_published(tmp_path: Path) -> None:
    passed, reasons = decide(tmp_path, new=0.65, old=0.75)

    assert not passed
    assert "auc fell by 0.1000" in reasons


def test_a_small_drop_and_a_first_model_pass(tmp_path: Path) -> None:
    assert decide(tmp_path / "small", new=0.74, old=0.75) == (True, "")
    assert decide(tmp_path / "first", new=0.55, old=None) == (True, "")

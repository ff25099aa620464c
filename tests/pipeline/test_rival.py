"""A new model and the one in production are compared on the same rows, where that can be."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deploy.app import main
from embedding.errors import UserError
from pipeline import rival as rival_module
from pipeline.metrics_file import read_metrics
from pipeline.recipe import load_recipe
from pipeline.registry import production_before
from pipeline.rival import EvaluatedRows, rival_of
from ranking.evaluation import evaluate_predictions
from tests.one_process import in_one_process
from tests.pipeline.small_log import DAYS, write_days_to_train_on, write_log_to_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two days that were run one after the other; a third day to evaluate on."""
    folder = tmp_path_factory.mktemp("rival")
    write_log_to_run(folder, 3, max_auc_drop=1.0)
    with in_one_process():
        for day in range(2):
            assert run(folder, day) == 0
        yield folder


def run(folder: Path, day: int, *settings: str, out: Path | None = None) -> int:
    words = ["--recipe", str(folder / "small.yaml"), "--date", DAYS[day]]
    overrides = [f"--set={setting}" for setting in settings]
    return main(["run", *words, "--out", str(out or folder / "runs"), *overrides])


def run_with_texts(folder: Path, tmp_path: Path) -> Path:
    """The same two days with texts that a tower reads."""
    root, out = tmp_path / "data", tmp_path / "runs"
    write_days_to_train_on(root, 3)
    items = pq.read_table(root / "items.parquet")
    words = pa.array([f"a thing of kind {i}" for i in range(len(items))])
    pq.write_table(items.append_column("text", words), root / "items.parquet")
    tower = "text: {model: tiny, lora: null}, fusion: {kind: concat}, dim: 8"
    content = f"content={{{tower}, in_history: false}}"
    for day in range(2):
        assert run(folder, day, f"data.root={root}", content, out=out) == 0
    return out


def decision(out: Path) -> Any:
    return json.loads((out / DAYS[1] / "gate" / "gate.json").read_text())


@pytest.mark.parametrize("content", [False, True])
def test_production_is_scored_on_the_rows_of_the_new_model(
    folder: Path, tmp_path: Path, content: bool
) -> None:
    out, scores = folder / "runs", tmp_path / "scores.parquet"
    if content:
        out = run_with_texts(folder, tmp_path)
    decided = decision(out)
    assert (decided["compared_with"], decided["compared"]) == (DAYS[0], "on the same rows")

    bundle = ["--bundle", str(out / DAYS[0] / "publish" / "bundle")]
    samples = out / DAYS[2] / "join" / "samples"
    assert main(["score", *bundle, "--samples", str(samples), "--output", str(scores)]) == 0
    labels = pq.read_table(out / DAYS[1] / "evaluate" / "predictions")
    scored = pq.read_table(scores)
    assert scored["key:request_id"].equals(labels["key:request_id"])
    expected = evaluate_predictions(
        labels=labels["label:click"].to_numpy(),
        probs=scored["probability:click"].to_numpy(),
        groups=labels["key:user_id"].to_numpy(),
        slices={},
    )
    kept = out / DAYS[1] / "gate" / "production"
    found = json.loads((kept / "metrics.json").read_text())["tasks"]["click"]
    assert found["auc"] == pytest.approx(expected.auc, abs=1e-6)
    assert found["num_rows"] == 90
    assert not (kept / "predictions").exists()


def test_a_run_whose_rules_compare_nothing_predicts_nothing(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "runs", tmp_path / "runs"))

    assert run(folder, 1, "gate.max_auc_drop=null", out=out) == 0
    decided = decision(out)
    assert (decided["compared_with"], decided["compared"]) == (None, None)
    assert not (out / DAYS[1] / "gate" / "production").exists()


def edit_recipe(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what a training says it was trained with."""

    def edit(run: Path) -> None:
        path = run / "train" / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text())
        change(recipe)
        path.write_text(yaml.safe_dump(recipe))

    return edit


def edit_facts(stage: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what a stage says of its artifact."""

    def edit(run: Path) -> None:
        path = run / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest["facts"])
        path.write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda run: shutil.rmtree(run / "train"), "the run that trained it is no longer in"),
        (lambda run: shutil.rmtree(run / "plan"), "the run that trained it is no longer in"),
        (lambda run: (run / "train" / "recipe.yaml").write_text(""), "holds no mapping"),
        (edit_recipe(lambda r: r["features"]["dense"].pop()), "its samples are others (features)"),
        (edit_recipe(lambda r: r["cluster"].update(num_workers=2)), "placed on another cluster"),
        (
            edit_recipe(lambda r: r.update(content={"text": {}})),
            "texts and images is another",
        ),
        (edit_facts("train", lambda f: f.update(codebooks="v1-a")), "codes are of other codebooks"),
        (edit_facts("plan", lambda f: f["cluster"].update(topology="h200:2x4")), "another cluster"),
    ],
)
def test_what_was_published_stands_in_where_rows_cannot_be_the_same(
    folder: Path, tmp_path: Path, change: Callable[[Path], Any], why: str
) -> None:
    out = Path(shutil.copytree(folder / "runs", tmp_path / "runs"))
    change(out / DAYS[0])
    current = production_before(out, DAYS[1])
    assert current is not None

    def never() -> Any:
        raise AssertionError("nothing is predicted")

    new = EvaluatedRows(out / DAYS[1], (DAYS[2],), never, None)
    rival = rival_of(load_recipe(str(folder / "small.yaml")), current, new, tmp_path, never)
    assert rival is not None
    assert rival.rows.startswith("on the days after its own date, since ")
    assert why in rival.rows
    assert rival.metrics == read_metrics(out / DAYS[0] / "evaluate" / "metrics.json")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (UserError("the cluster had no room for a group"), "had no room"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    ],
)
def test_what_is_no_fault_of_the_model_in_production_fails_the_stage(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    message: str,
) -> None:
    def evaluate(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(rival_module, "evaluate", evaluate)
    current = production_before(folder / "runs", DAYS[1])
    assert current is not None
    new = EvaluatedRows(folder / "runs" / DAYS[1], (DAYS[2],), list, None)

    with pytest.raises(type(fault), match=message):
        rival_of(load_recipe(str(folder / "small.yaml")), current, new, tmp_path, lambda: None)


def test_a_damaged_model_in_production_holds_no_new_one_back(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "runs", tmp_path / "runs"))
    (data, *_) = (out / DAYS[0] / "train" / "checkpoint").rglob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.unlink()  # a copy may share its blocks
    data.write_bytes(content)
    shutil.rmtree(out / DAYS[1] / "gate")

    assert run(folder, 1, out=out) == 0
    decided = decision(out)
    assert decided["compared"].startswith("on the days after its own date, since the checkpoint ")
    assert "has another checksum" in decided["compared"]
    assert not (out / DAYS[1] / "gate" / "production").exists()

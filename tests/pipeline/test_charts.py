"""The training section of a report: curves of the windows, and of the held-out days."""

import json
from pathlib import Path
from typing import Any

from pipeline.reports.report import _training_charts
from tests.pipeline.small_log import make_recipe


def _write(train: Path, records: list[dict[str, Any]]) -> None:
    (train / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_held_out_days_have_charts_with_the_best_step_marked(tmp_path: Path) -> None:
    window = {"train/click/ne": 0.9, "train/click/auc": 0.6}
    held_out = {
        "validation/since_best": 0.0,
        "validation/click/ne": 0.8,
        "validation/click/auc": 0.7,
    }
    recipe = make_recipe(tmp_path)

    _write(tmp_path, [{"step": 10, **window}, {"step": 20, **window}])
    without = _training_charts(tmp_path, recipe, best_step=None)
    _write(tmp_path, [{"step": 10, **window}, {"step": 10, **held_out}, {"step": 20, **held_out}])
    unmarked, marked = (_training_charts(tmp_path, recipe, best_step=step) for step in (None, 20))

    assert [chart["title"] for chart in without] == [
        "Training rows: normalized entropy between two log lines",
        "Training rows: AUC between two log lines",
    ]
    assert [chart["title"] for chart in marked[2:]] == [
        "Normalized entropy on held-out days",
        "AUC on held-out days",
    ]
    assert unmarked[:2] == marked[:2]
    assert all(a["svg"] != b["svg"] for a, b in zip(unmarked[2:], marked[2:], strict=True))

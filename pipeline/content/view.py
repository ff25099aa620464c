"""What the report shows of content in training: its gradients, its age and its cost."""

from collections.abc import Sequence
from typing import Any

from pipeline.reports import charts

_PREFIX = "content/"
_NORM = f"{_PREFIX}gradient_norm_"


def content_charts(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Charts over the step lines of `metrics.jsonl`; empty where the model read no content."""
    names = sorted({name for line in lines for name in line if name.startswith(_PREFIX)})
    if not names:
        return []
    norms = {name.removeprefix(_NORM): name for name in names if name.startswith(_NORM)}
    groups = [
        ("Norm of the content encoder's gradients", "norm", norms),
        (
            "Steps since the content vectors in use were computed",
            "steps",
            {"mean age": f"{_PREFIX}bank_age_steps"},
        ),
        (
            "Likeness of an item's vectors before and after it is encoded anew",
            "cosine",
            {"mean": f"{_PREFIX}bank_cosine"},
        ),
        (
            "Items of a step",
            "items",
            {
                "encoded, all ranks": f"{_PREFIX}encoded_items",
                "distinct, one rank": f"{_PREFIX}distinct_items_per_rank",
            },
        ),
        (
            "Time of a step",
            "seconds",
            {"step": "time/step_s", "of it content": f"{_PREFIX}seconds_per_step"},
        ),
    ]
    return [
        {
            "title": title,
            "svg": charts.lines(
                {label: _curve(lines, key) for label, key in keys.items()},
                x_label="step",
                y_label=unit,
            ),
        }
        for title, unit, keys in groups
        if keys
    ]


def _curve(lines: Sequence[dict[str, Any]], key: str) -> charts.Curve:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]

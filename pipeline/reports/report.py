"""`report.html`: one self-contained page about one run, made from its artifacts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from embedding.checkpoint_files import latest_step, step_directory
from pipeline.artifacts import FactsT_co, Manifest, read_manifest
from pipeline.codes.align_report import align_section
from pipeline.codes.report import code_section
from pipeline.config import Recipe
from pipeline.console import duration, figure, human, size
from pipeline.content.facts import ContentFacts
from pipeline.content.paths import ContentPaths
from pipeline.content.stage import STORES
from pipeline.content.view import content_charts
from pipeline.reports import charts
from pipeline.reports.item_cards import shown_catalogue
from pipeline.reports.page import write_page
from pipeline.reports.warm_start_view import redrawn_rows, warm_start_line
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.samples.join_facts import JoinFacts
from pipeline.samples.table_ids import table_ids
from pipeline.summary import Summary, TrainSummary
from pipeline.train import CHECKPOINT
from pipeline.train_facts import TrainFacts

REPORT = "report.html"
MIB = 1 << 20


def write_report(recipe: Recipe, summary: Summary, directory: Path) -> Path:
    """Write the report of a finished run in one move."""
    return write_page(
        directory / REPORT,
        "report.html.j2",
        summary=summary,
        group_by=recipe.evaluation.group_by,
        rare_max_events=recipe.evaluation.rare_max_events,
        popular_share=recipe.evaluation.popular_share,
        tiles=_tiles(recipe, summary),
        quality=_quality(summary),
        training_charts=_training_charts(directory / "train", recipe, summary.train.best_step),
        calibration=_calibration(summary),
        stages=_stages(summary),
        recipe_yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100),
        align=align_section(recipe, directory),
        codes=(
            code_section(shown_catalogue(recipe), directory, recipe.gate.task)
            if recipe.codes
            else None
        ),
        content=_content(recipe, directory),
        **warm_start_section(_require(directory / "train", TrainFacts).facts),
        **_data(directory / "ingest"),
        **_ids(recipe, directory / "join"),
        **_plan(directory / "plan"),
    )


def _tiles(recipe: Recipe, summary: Summary) -> list[dict[str, str]]:
    metrics = summary.eval[recipe.gate.task]
    best = summary.oracle.get(recipe.gate.task)
    seconds = sum(stage.seconds for stage in summary.stages.values())
    return [
        {
            "label": f"AUC, {recipe.gate.task}",
            "value": figure(metrics.auc),
            "note": f"of {figure(best.auc)} possible" if best else "evaluation days",
        },
        {"label": "GAUC", "value": figure(metrics.gauc), "note": "impression-weighted"},
        {
            "label": "Training",
            "value": f"{human(summary.train.rows_per_s)}/s",
            "note": _training_note(summary.train),
        },
        {
            "label": "Waiting for data",
            "value": f"{summary.train.data_wait_share:.1%}",
            "note": "of the training loop",
        },
        {"label": "Whole run", "value": duration(seconds), "note": "sum of the stages"},
    ]


def _training_note(train: TrainSummary) -> str:
    ranks = "1 rank" if train.world_size == 1 else f"{train.world_size} ranks"
    note = f"rows, {ranks}, {train.steps} steps"
    if train.best_step is not None:
        note += f", best {train.best_step}"
    return f"{note}, stopped early" if train.stopped_early else note


def _quality(summary: Summary) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in summary.eval.items():
        oracle = summary.oracle.get(task)
        rows.append(_quality_row(task, "", metrics, oracle))
        for name, part in metrics.slices.items():
            best = oracle.slices.get(name) if oracle else None
            rows.append(_quality_row(task, name, part, best))
    return rows


def _quality_row(task: str, name: str, metrics: Any, oracle: Any) -> dict[str, Any]:
    best = None if oracle is None else oracle.auc
    reach = None
    if best is not None and metrics.auc is not None and best > 0.5:
        reach = min(max((metrics.auc - 0.5) / (best - 0.5), 0.0), 1.0)
    return {
        "task": task,
        "slice": name,
        "rows": human(metrics.num_rows),
        "auc": figure(metrics.auc),
        "oracle": figure(best),
        "reach": reach,
        "gauc": figure(metrics.gauc),
        "logloss": figure(metrics.logloss),
        "ne": figure(metrics.ne),
        "calibration": figure(metrics.calibration),
    }


def warm_start_section(facts: TrainFacts) -> dict[str, Any]:
    """What the report says about the start values of a training."""
    report, parent = facts.result.warm_start, facts.parent
    if parent is None:
        return {
            "warm_start": "cold start: all values were drawn",
            "redrawn": [],
        }
    assert report is not None
    return {"warm_start": warm_start_line(report, parent), "redrawn": redrawn_rows(report)}


def _content(recipe: Recipe, directory: Path) -> dict[str, Any] | None:
    if recipe.content is None:
        return None
    # They load towers: pages without content do without.
    from pipeline.content.before_and_after import vector_sets
    from pipeline.content.pictures import content_pictures

    manifest = _require(directory / "content", ContentFacts)
    checkpoints = directory / "train" / CHECKPOINT
    step = latest_step(checkpoints)
    assert step is not None, checkpoints
    paths = ContentPaths(index=directory / "content", stores=directory.parent / STORES)
    item_ids_N, sets = vector_sets(recipe, paths, step_directory(checkpoints, step))
    pictures = content_pictures(recipe.content, recipe.data.root, item_ids_N, sets)
    return {"facts": manifest.facts, **pictures}


def _training_charts(train: Path, recipe: Recipe, best_step: int | None) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in (train / "metrics.jsonl").read_text().splitlines()]
    tasks = [task.name for task in recipe.ranking.tasks]
    found = [
        ("Training rows: normalized entropy between two log lines", "train", "ne", 1.0),
        ("Training rows: AUC between two log lines", "train", "auc", None),
    ]
    if any("validation/since_best" in line for line in lines):
        found += [
            ("Normalized entropy on held-out days", "validation", "ne", None),
            ("AUC on held-out days", "validation", "auc", None),
        ]
    shown = [
        {
            "title": title,
            "svg": charts.lines(
                _curves(lines, {task: f"{rows}/{task}/{metric}" for task in tasks}),
                x_label="step",
                y_label=metric,
                reference=reference,
                mark=best_step if rows == "validation" else None,
            ),
        }
        for title, rows, metric, reference in found
    ]
    return shown + content_charts(lines)


def _curves(lines: list[dict[str, Any]], keys: Mapping[str, str]) -> dict[str, charts.Curve]:
    curves: dict[str, charts.Curve] = {}
    for name, key in keys.items():
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    return curves


def _calibration(summary: Summary) -> str:
    curves: dict[str, charts.Curve] = {}
    for task, metrics in summary.eval.items():
        bins = [b for b in metrics.reliability if b.num_rows]
        curves[task] = ([b.mean_prediction for b in bins], [b.label_rate for b in bins])
    return charts.calibration(curves)


def _stages(summary: Summary) -> list[dict[str, Any]]:
    longest = max([stage.seconds for stage in summary.stages.values()] + [1e-9])
    return [
        {
            "name": name,
            "status": stage.status,
            "time": duration(stage.seconds),
            "share": stage.seconds / longest,
            "rows_in": human(stage.rows_in),
            "rows_out": human(stage.rows_out),
        }
        for name, stage in summary.stages.items()
    ]


def _data(ingest: Path) -> dict[str, Any]:
    manifest = _require(ingest, IngestFacts)
    shown: dict[str, float] = dict(list(manifest.facts.rows_per_day.items())[-14:])
    labels = [
        {"name": name, "rows": human(label.observed), "rate": f"{label.rate:.2%}"}
        for name, label in manifest.facts.labels.items()
    ]
    return {
        "days_chart": charts.bars(shown, x_label="events", value_format="{:,.0f}"),
        "labels": labels,
        "quarantined": manifest.quarantined,
    }


def _ids(recipe: Recipe, join: Path) -> dict[str, Any]:
    manifest = _require(join, JoinFacts)
    days = list(manifest.facts.rows_per_day)
    found = table_ids(recipe.features, join, manifest.facts.ids)
    rows = [
        {
            "table": ids.table,
            "scheme": ids.scheme,
            "lookups": human(ids.lookups),
            "missing": f"{ids.missing_share:.1%}",
            "distinct": ("~" if ids.sampled else "") + human(ids.distinct),
            "colliding": "-" if ids.collision_rate is None else f"{ids.collision_rate:.1%}",
            "outside": "-" if ids.out_of_range is None else human(ids.out_of_range),
            "is_bad": bool(ids.out_of_range),
        }
        for ids in found
    ]
    return {
        "table_ids": rows,
        "ids_days": f"{days[0]} .. {days[-1]}",
    }


def _plan(directory: Path) -> dict[str, Any]:
    plan = json.loads((directory / "plan.json").read_text())
    per_rank = [0.0] * plan["world_size"]
    tables = []
    for table in plan["tables"]:
        shards = table["shards"]
        for shard in shards:
            per_rank[shard["rank"]] += shard["weight_bytes"] / MIB
        tables.append(
            {
                "name": table["table"],
                "sharding": table["sharding"],
                "kernel": table["kernel"],
                "rows": human(max(s["row_offset"] + s["num_rows"] for s in shards)),
                "dim": max(s["column_offset"] + s["num_columns"] for s in shards),
                "weights": size(sum(s["weight_bytes"] for s in shards)),
                "ranks": ", ".join(str(r) for r in sorted({s["rank"] for s in shards})),
            }
        )
    chart = charts.bars({f"rank {r}": mib for r, mib in enumerate(per_rank)}, x_label="MiB")
    return {"plan_tables": tables, "plan_chart": chart}


def _require(directory: Path, facts: type[FactsT_co]) -> Manifest[FactsT_co]:
    manifest = read_manifest(directory, facts)
    assert manifest is not None, directory
    return manifest

"""The report's section on codes: figures of the day, and a browser from codes to items."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from multimodal.codes.tree import CodeTree
from multimodal.codes.vectors import Int32Array
from pipeline.artifacts import read_manifest
from pipeline.codes.features import CODES_FILE
from pipeline.codes.quantize_facts import QuantizeFacts, collapse_warning
from pipeline.content.tasks import Catalogue
from pipeline.evaluate import COLD
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.reports.item_cards import ItemCard, item_cards
from pipeline.train_facts import TrainFacts

NUM_FIRST_CODES = 6
NUM_PREFIXES = 3
NUM_ITEMS = 8
NUM_DAYS = 14


def code_section(catalogue: Catalogue, directory: Path, task: str) -> dict[str, Any] | None:
    """What the report says about codes; None for a run without them.

    Args:
        catalogue: its texts and images are shown.
        directory: of the run.
        task: whose AUC is shown day by day.
    """
    manifest = read_manifest(directory / "quantize", QuantizeFacts)
    trained = read_manifest(directory / "train", TrainFacts)
    if manifest is None:
        return None
    facts = manifest.facts
    started = None if trained is None else trained.facts.result.warm_start
    return {
        "tiles": _tiles(facts),
        "taken_from": facts.taken_from,
        "decision": _decision(facts),
        "warning": collapse_warning(facts.mean_cosine),
        "levels": level_rows(facts),
        "task": task,
        "days": code_days(directory, task),
        "tables": {} if started is None else started.rows,
        "max_items": NUM_ITEMS,
        "browser": browse(directory / "quantize" / CODES_FILE, catalogue),
    }


def _tiles(facts: QuantizeFacts) -> list[dict[str, str]]:
    looked_up = ""
    if facts.num_encoded is not None and facts.num_encoded < facts.num_items:
        looked_up = f", {facts.num_encoded:,} of them looked up"
    unseen = f", {facts.num_unseen_items} not seen yet" if facts.num_unseen_items else ""
    without = f", {facts.num_without_vector} without a vector" if facts.num_without_vector else ""
    tiles = [
        {
            "label": "Codebooks",
            "value": facts.version,
            "note": "refit" if facts.refit.refit else "",
        },
        {
            "label": "Items",
            "value": f"{facts.num_items:,}",
            "note": f"coded{looked_up}{unseen}{without}",
        },
    ]
    if facts.metrics:
        shared = f"at most {facts.metrics.largest_collision} items a code"
        tiles += [
            {
                "label": "Collisions",
                "value": f"{facts.metrics.collision_rate:.1%}",
                "note": f"of items share their full code, {shared}",
            },
            {
                "label": "Self-retrieval",
                "value": f"{facts.metrics.hit_rate_10:.1%}",
                "note": f"HR@10 of what a code stands for; HR@1 {facts.metrics.hit_rate_1:.1%}",
            },
        ]
    if "sid_suffix" in facts.table_sizes:
        tiles.append(
            {
                "label": "Without a suffix of their own",
                "value": f"{facts.num_sharing_suffix:,}",
                "note": f"items; the last of {facts.table_sizes['sid_suffix']:,} numbers is theirs",
            }
        )
    if facts.stability:
        tiles.append(
            {
                "label": "Stability",
                "value": f"{facts.stability.full:.1%}",
                "note": "of items keep their full code since the run before",
            }
        )
    return tiles


def _decision(facts: QuantizeFacts) -> str:
    said = "Fitted anew" if facts.refit.refit else "Not fitted anew"
    reasons = "; ".join(facts.refit.reasons)
    said += f": {reasons}" if reasons else ""
    drift = facts.drift
    if drift is None:
        return f"{said}."
    parts = [f"age {drift.age_days} days", f"{drift.num_new_items} items since the fit"]
    if drift.error_ratio is not None:
        parts.append(f"their error is {drift.error_ratio:.2f} times that of the fit")
    if drift.utilisation_ratio is not None:
        parts.append(
            f"they use {drift.utilisation_ratio:.0%} of the codewords that as many items of the "
            "fit would"
        )
    return f"{said}. Drift: {', '.join(parts)}."


def level_rows(facts: QuantizeFacts) -> list[dict[str, str]]:
    """Figures of every level of the RQ codes, as text."""
    if facts.metrics is None:
        return []
    whole = facts.metrics.mean_squared_length
    return [
        {
            "level": f"sid_{level}",
            "codes": f"{metrics.num_codes:,}",
            "utilisation": f"{metrics.utilisation:.1%}",
            "perplexity": f"{metrics.perplexity:,.1f}",
            "mse": f"{metrics.mse:.4g}",
            "left": f"{metrics.mse / whole:.1%}" if whole else "-",
            "stable": f"{facts.stability.levels[level]:.1%}" if facts.stability else "-",
        }
        for level, metrics in enumerate(facts.metrics.levels)
    ]


# --- days ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeDay:
    """A run with codes, for comparing days before and after a refit."""

    date: str
    version: str
    is_refit: bool
    stability: float | None
    """Share of items whose full code is that of the run before."""
    auc: float | None
    new_auc: float | None
    """Of candidates that no event had shown by the date."""


def code_days(directory: Path, task: str) -> list[CodeDay]:
    """The latest runs up to this one that have codes and were evaluated, by date.

    Args:
        directory: of the run; the others lie beside it.
        task: whose AUC is meant.
    """
    days = []
    for run in sorted(directory.parent.glob("????-??-??")):
        manifest = read_manifest(run / "quantize", QuantizeFacts)
        metrics = read_metrics(run / "evaluate" / METRICS_FILE).get(task)
        if run.name > directory.name or manifest is None or metrics is None:
            continue
        facts = manifest.facts
        new = metrics.slices.get(COLD)
        days.append(
            CodeDay(
                date=run.name,
                version=facts.version,
                is_refit=facts.refit.refit,
                stability=facts.stability.full if facts.stability else None,
                auc=metrics.auc,
                new_auc=new.auc if new else None,
            )
        )
    return days[-NUM_DAYS:]


# --- browser -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownCode:
    """A code prefix and some of its items."""

    prefix: str
    num_items: int
    shown: list[ItemCard]


def browse(codes: Path, catalogue: Catalogue) -> list[ShownCode]:
    """The most frequent first codes, their most frequent second codes, and items of each.

    Args:
        codes: a codes artifact's file.
        catalogue: its texts and images are shown.
    """
    levels = [name for name in ("sid_0", "sid_1") if name in pq.read_schema(codes).names]
    if not levels:
        return []
    table = pq.read_table(codes, columns=["item_id", *levels])
    codes_NL: Int32Array = np.stack([table[name].to_numpy() for name in levels], axis=1)
    tree = CodeTree.of(codes_NL)
    prefixes: list[tuple[int, ...]] = []
    for first in list(tree.children())[:NUM_FIRST_CODES]:
        seconds = list(tree.children((first,)))[:NUM_PREFIXES]
        prefixes += [(first, second) for second in seconds] or [(first,)]
    members = {prefix: tree.items(prefix) for prefix in prefixes}
    ids = table["item_id"].to_numpy()
    wanted = np.unique(np.concatenate([ids[rows[:NUM_ITEMS]] for rows in members.values()]))
    cards = item_cards(catalogue, wanted)
    return [
        ShownCode(
            "-".join(map(str, prefix)),
            len(rows),
            [cards[item] for item in ids[rows[:NUM_ITEMS]].tolist()],
        )
        for prefix, rows in members.items()
    ]

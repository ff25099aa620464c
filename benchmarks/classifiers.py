"""Every classifier alone and with FGCNN on Frappe, seed by seed, with GBDT as a reference.

Run: .venv/bin/python benchmarks/classifiers.py --data data/frappe --out runs/classifiers
         [--seeds 3] [--only ipnn,dnn] [--precision fp32|bf16] [--trials-per-gpu N] [--quick]
         [--json FILE]

`braid data import frappe` makes the data. The split is random, 7:2:1: trained on the first part,
stopped by AUC on the second, compared on the third. Trials are kept in --out: a second run goes on
where the first one ended. GBDT is LightGBM (requirements/benchmarks.txt) on the
same columns, also stopped on the second part.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from environment import describe
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss, roc_auc_score

from embedding.errors import UserError
from pipeline.study.report import signed
from pipeline.study.samples import samples_key
from pipeline.study.statistics import Difference, Estimate, StudyResult, differences
from pipeline.study.study import Study, Variant

DATE = "2015-01-02"
TRAIN, VALIDATION, TEST = "dt=2015-01-01", "dt=2015-01-02", "dt=2015-01-03"
MLP = "hidden: [400, 400], dropout: 0.5"
SETTINGS = {
    "lr": "",
    "fm": "",
    "ffm": "",
    "dnn": MLP,
    "wide_deep": MLP,
    "deepfm": MLP,
    "ccpm": "",
    "ipnn": MLP,
    "opnn": MLP,
    "pin": MLP,
    "xdeepfm": MLP,
    "dcn_v2": MLP,
    "dlrm": MLP,
    "fibinet": MLP,
    "autoint": MLP,
    "masknet": MLP,
    "final_mlp": "first_hidden: [400], second_hidden: [400], dropout: 0.5",
}
GENERATOR = "{maps: [8, 8], heights: [7, 7], pools: [2, 2], new_maps: [2, 2]}"
LIFTED = ("fm", "dnn", "deepfm", "ipnn", "dcn_v2")
METRICS = ("use.auc", "use.logloss")


def variants(kinds: list[str]) -> list[Variant]:
    """Every kind alone and with FGCNN."""
    found = []
    for kind in kinds:
        settings = ", ".join(part for part in (f"kind: {kind}", SETTINGS[kind]) if part)
        classifier = f"ranking.model.classifier={{{settings}}}"
        found.append(Variant(kind, (classifier,)))
        found.append(Variant(f"{kind}+fgcnn", (classifier, f"ranking.model.generator={GENERATOR}")))
    return found


def by_seed(result: StudyResult, name: str) -> dict[int, dict[str, float]]:
    """Trials of a variant as `study_statistics` takes them."""
    found: Mapping[str, Estimate] = result.variants[name]
    seeds = found[METRICS[0]].seeds if found else ()
    return {
        seed: {metric: found[metric].values[i] for metric in METRICS}
        for i, seed in enumerate(seeds)
    }


def gbdt(study: Study) -> dict[str, list[float]]:
    """LightGBM on the sample columns that the study trains on, all of them categories."""
    root = study.out / "data" / samples_key(study.first, study.date)
    parts = {
        name: pa.concat_tables(
            pq.read_table(path) for path in sorted(root.glob(f"*/join/samples/{name}/*.parquet"))
        )
        for name in (TRAIN, VALIDATION, TEST)
    }
    names = [name for name in parts[TRAIN].column_names if name.startswith("sparse:")]
    encoded = {name: _codes([parts[p][name].to_numpy() for p in parts]) for name in names}
    inputs = {
        part: np.stack([encoded[name][i] for name in names], axis=1) for i, part in enumerate(parts)
    }
    labels = {part: table["label:use"].to_numpy() for part, table in parts.items()}
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for seed in study.seeds:
        model = lightgbm.LGBMClassifier(
            n_estimators=2000,
            learning_rate=0.1,
            num_leaves=255,
            min_child_samples=20,
            cat_smooth=10,
            random_state=seed,
            verbose=-1,
        )
        model.fit(
            inputs[TRAIN],
            labels[TRAIN],
            eval_set=[(inputs[VALIDATION], labels[VALIDATION])],
            eval_metric="auc",
            categorical_feature=list(range(len(names))),
            callbacks=[lightgbm.early_stopping(50, verbose=False)],
        )
        probs = model.predict_proba(inputs[TEST])[:, 1]
        found["use.auc"].append(roc_auc_score(labels[TEST], probs))
        found["use.logloss"].append(log_loss(labels[TEST], probs))
    return found


def _codes(columns: list[Any]) -> list[Any]:
    """Categories 0, 1, ... of one column in all parts."""
    _, codes = np.unique(np.concatenate(columns), return_inverse=True)
    return np.split(codes, np.cumsum([len(column) for column in columns])[:-1])


def main() -> None:
    """Run what is missing, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/frappe"))
    parser.add_argument("--out", type=Path, default=Path("runs/classifiers"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="kinds, separated by commas; default: all")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trials-per-gpu", type=int, help="train on GPUs; default: on CPUs")
    parser.add_argument("--quick", action="store_true", help="ipnn only, one seed, two epochs")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    kinds = ["ipnn"] if args.quick else (args.only.split(",") if args.only else list(SETTINGS))
    unknown = sorted(set(kinds) - set(SETTINGS))
    if unknown:
        raise UserError(f"--only: {unknown} are no classifiers; they are {list(SETTINGS)}")
    seeds = 1 if args.quick else args.seeds
    overrides = [
        f"data.root={args.data}",
        "cluster.num_workers=1",
        f"ranking.trainer.precision={args.precision}",
    ]
    if args.quick:
        overrides.append("ranking.trainer.epochs=2")
    if args.trials_per_gpu:
        overrides.append("cluster.use_gpu=true")
    study = Study(
        "frappe",
        variants(kinds),
        date=DATE,
        num_seeds=seeds,
        out=args.out,
        overrides=overrides,
        trials_per_gpu=args.trials_per_gpu or 1,
    )
    result = study.run()
    figures: dict[str, Any] = {"gbdt": gbdt(study), "failed": result.failed}
    figures |= {kind: compared(result, kind) for kind in kinds}
    console = Console(width=120)
    console.print(summary(figures, kinds, seeds))
    for name, reason in result.failed.items():
        console.print(f"failed: {name}: {reason}", markup=False)
    if args.json:
        args.json.write_text(json.dumps({**figures, **describe()}, indent=2))


def compared(result: StudyResult, kind: str) -> dict[str, Any]:
    """Both variants of a classifier by metric; lists are empty where all trials of one failed."""
    alone, augmented = by_seed(result, kind), by_seed(result, f"{kind}+fgcnn")
    paired = differences(augmented, alone)
    return {
        "alone": {metric: [trial[metric] for trial in alone.values()] for metric in METRICS},
        "fgcnn": {metric: [trial[metric] for trial in augmented.values()] for metric in METRICS},
        "gain": {metric: paired[metric].model_dump() for metric in METRICS if metric in paired},
    }


def summary(figures: dict[str, Any], kinds: list[str], seeds: int) -> Table:
    """A classifier a row; a dash where no trial finished."""
    title = (
        f"Frappe, random 7:2:1 split, {seeds} seeds: means; gain with 95% interval over seeds, "
        "given this test set"
    )
    table = Table(title=title)
    for column in ("classifier", "AUC", "with FGCNN", "gain", "logloss", "with FGCNN", "gain"):
        table.add_column(column, justify="left" if column == "classifier" else "right")
    means = [_mean(figures["gbdt"][metric]) for metric in METRICS]
    table.add_row("gbdt (LightGBM)", means[0], "", "", means[1])
    for kind in kinds:
        cells = [kind]
        for metric in METRICS:
            row = figures[kind]
            cells += [_mean(row[side][metric]) for side in ("alone", "fgcnn")]
            gain = row["gain"].get(metric)
            cells.append("-" if gain is None else signed(Difference(**gain)))
        table.add_row(*cells)
    gains = {k: figures[k]["gain"].get("use.auc") for k in LIFTED if k in kinds}
    lifted = [kind for kind, gain in gains.items() if gain is not None and gain["diff"] > 0]
    table.caption = f"FGCNN raises the mean AUC of {len(lifted)} of {', '.join(gains)}: {lifted}"
    return table


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}" if values else "-"


if __name__ == "__main__":
    main()

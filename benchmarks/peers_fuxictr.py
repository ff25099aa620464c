"""The FuxiCTR side of `peers.py`: runs in the environment that has FuxiCTR, not in Braid's.

Arguments: a JSON object. Then one command a line on stdin, one JSON object a line on stdout.
The rows are in memory before a step begins, so reading data costs this side nothing.
"""

import importlib.util
import json
import logging
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from fuxictr.features import FeatureMap
from sklearn.metrics import log_loss, roc_auc_score

MODELS = {
    "deepfm": ("DeepFM/DeepFM_torch/src/DeepFM.py", "DeepFM", {"hidden_units": [1024, 512, 256]}),
    "dcnv2": (
        "DCNv2/src/DCNv2.py",
        "DCNv2",
        {
            "model_structure": "parallel",
            "num_cross_layers": 3,
            "parallel_dnn_hidden_units": [1024, 512],
        },
    ),
    "fgcnn": (
        "FGCNN/src/FGCNN.py",
        "FGCNN",
        {
            "channels": [14, 16, 18, 20],
            "kernel_heights": [7, 7, 7, 7],
            "pooling_sizes": [2, 2, 2, 2],
            "recombined_channels": [2, 2, 2, 2],
            "conv_batch_norm": False,
            "dnn_hidden_units": [1024, 512],
        },
    ),
}


def feature_map(rows_per_table):
    """One categorical feature a table; ids are rows already."""
    features = FeatureMap("peers", ".")
    features.features = OrderedDict(
        (f"s{i}", {"source": "", "type": "categorical", "vocab_size": rows, "padding_idx": None})
        for i, rows in enumerate(rows_per_table)
    )
    features.labels = ["click"]
    features.num_fields = len(rows_per_table)
    features.default_emb_dim = 16
    features.total_features = sum(rows_per_table)
    features.set_column_index()
    return features


def build(job):
    """The model of the public repository, with Adam at its default rate."""
    file, name, settings = MODELS[job["model"]]
    spec = importlib.util.spec_from_file_location("peer_model", Path(job["models"]) / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = getattr(module, name)(
        feature_map(job["rows_per_table"]),
        embedding_dim=16,
        learning_rate=1e-3,
        optimizer="adam",
        loss="binary_crossentropy",
        metrics=["AUC"],
        model_root=job["scratch"],
        verbose=0,
        gpu=-1,
        **settings,
    )
    model._max_gradient_norm = 10.0  # what its own `fit` uses
    model.train()
    return model


def load(path, num_tables):
    """Column tensors of one file."""
    table = pq.read_table(path)
    columns = {
        f"s{i}": torch.from_numpy(table[f"sparse:s{i}"].to_numpy()) for i in range(num_tables)
    }
    columns["click"] = torch.from_numpy(table["label:click"].to_numpy())
    return columns


def batches(columns, size, generator):
    """Full batches of one shuffled pass."""
    order = torch.randperm(len(columns["click"]), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield {name: values[rows] for name, values in columns.items()}


def train(model, data, steps):
    """Rows per second of some steps; batches are cut before the clock starts."""
    taken = [next(data) for _ in range(steps)]
    started = time.perf_counter()
    for batch in taken:
        model.train_step(batch)
    return sum(len(batch["click"]) for batch in taken) / (time.perf_counter() - started)


def evaluate(model, columns):
    """AUC and logloss over all rows of a file."""
    model.eval()
    probs = []
    with torch.no_grad():
        for start in range(0, len(columns["click"]), 8192):
            batch = {name: values[start : start + 8192] for name, values in columns.items()}
            probs.append(model.forward(batch)["y_pred"].flatten().numpy())
    model.train()
    labels, scores = columns["click"].numpy(), np.concatenate(probs).astype(np.float64)
    return {
        "auc": roc_auc_score(labels, scores),
        "logloss": log_loss(labels, scores.clip(1e-7, 1 - 1e-7)),
    }


def endless(columns, size):
    """Batches of one pass after the other."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from batches(columns, size, generator)


def main():
    """Obey the commands."""
    logging.disable(logging.INFO)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    columns = load(job["train"], len(job["rows_per_table"]))
    model = build(job)
    data = endless(columns, job["batch_size"])
    for line in sys.stdin:
        command = json.loads(line)
        if "steps" in command:
            answer = {"rows_per_s": train(model, data, command["steps"])}
        else:
            model = build(job)
            generator = torch.Generator().manual_seed(0)
            for batch in batches(columns, job["batch_size"], generator):
                model.train_step(batch)
            answer = evaluate(model, load(job["test"], len(job["rows_per_table"])))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The FuxiCTR side of `peers.py`: runs in the environment that has FuxiCTR, not in Braid's.

Arguments: a JSON object. Then one command a line on stdin, one JSON object a line on stdout.
Batches come from the package's own Parquet loader, as in its `fit`, and steps are its `train_step`,
which always clips the norm of all gradients. With `bare`, batches are cut before the clock starts
and nothing is clipped: this side then pays for forward, backward and update only.
"""

import importlib.util
import json
import logging
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from sklearn.metrics import log_loss, roc_auc_score

LABEL = "label:click"
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
        (
            f"sparse:s{i}",
            {"source": "", "type": "categorical", "vocab_size": rows, "padding_idx": None},
        )
        for i, rows in enumerate(rows_per_table)
    )
    features.labels = [LABEL]
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


def loader(features, path, size, *, shuffle):
    """The package's own, with its defaults: Ray Data reads and shuffles."""
    stage = "train" if shuffle else "test"
    data = RankDataLoader(
        features,
        stage=stage,
        **{f"{stage}_data": path},
        batch_size=size,
        shuffle=shuffle,
        data_format="parquet",
    )
    return data[0] if shuffle else data  # for training: with batches to validate on, or None


def endless(batches, size):
    """Full batches of one pass after the other."""
    while True:
        yield from (batch for batch in batches if len(batch[LABEL]) == size)


def unclipped_step(model, batch):
    """Its `train_step` less the clipping, which no option of it leaves out."""
    model.optimizer.zero_grad()
    loss = model.compute_loss(model.forward(batch), model.get_labels(batch))
    loss.backward()
    model.optimizer.step()
    return loss


def train(model, data, steps, *, bare):
    """Rows per second of some steps."""
    if bare:
        data = iter([next(data) for _ in range(steps)])
    started, rows = time.perf_counter(), 0
    for _ in range(steps):
        batch = next(data)
        loss = unclipped_step(model, batch) if bare else model.train_step(batch)
        loss.item()  # its epoch adds up the losses
        rows += len(batch[LABEL])
    return rows / (time.perf_counter() - started)


def evaluate(model, batches):
    """AUC and logloss over all rows of a file."""
    model.eval()
    labels, scores = [], []
    with torch.no_grad():
        for batch in batches:
            scores.append(model.forward(batch)["y_pred"].flatten().double().numpy())
            labels.append(batch[LABEL].numpy())
    model.train()
    labels, scores = np.concatenate(labels), np.concatenate(scores)
    return {
        "auc": roc_auc_score(labels, scores),
        "logloss": log_loss(labels, scores.clip(1e-7, 1 - 1e-7)),
    }


def main():
    """Obey the commands."""
    logging.disable(logging.INFO)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    size = job["batch_size"]
    model = build(job)
    batches = loader(model.feature_map, job["train"], size, shuffle=True)
    data = endless(batches, size)
    for line in sys.stdin:
        command = json.loads(line)
        if "steps" in command:
            rate = train(model, data, command["steps"], bare=job["bare"])
            answer = {"rows_per_s": rate}
        else:
            model = build(job)
            for batch in batches:
                if len(batch[LABEL]) == size:
                    model.train_step(batch)
            answer = evaluate(model, loader(model.feature_map, job["test"], 8192, shuffle=False))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

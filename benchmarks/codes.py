"""Residual codes of a million vectors: fit, encode and error, beside faiss.ResidualQuantizer.

Both sides train on the same rows, and their errors are compared on the same rows, in one run. faiss
is shown with its defaults (max_beam_size 5) and with max_beam_size 1, which is what greedy residual
K-means is. `faiss_mse` is the smaller of the two.

Run: .venv/bin/python benchmarks/codes.py [--quick] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from environment import PeakMemory, describe
from rich.console import Console
from rich.table import Table

from multimodal.codes.config import Rq
from multimodal.codes.residual_fit import fit_residual, training_rows
from multimodal.codes.vectors import Float32Array

DIM = 64
COMPARED_ROWS = 200_000
"""Rows whose error is compared, and that faiss encodes; braid encodes all."""


def clustered_vectors(num_items: int) -> Float32Array:
    """Unit vectors: topics, subtopics of very different sizes, and noise."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((400, DIM))
    subtopics = topics[rng.integers(0, 400, 8000)] + 0.6 * rng.standard_normal((8000, DIM))
    popularity = 1 / np.arange(1, 8001) ** 0.7
    members = rng.choice(8000, num_items, p=popularity / popularity.sum())
    x = subtopics[members].astype(np.float32)
    x += 0.5 * rng.standard_normal((num_items, DIM), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def measure_ours(x_ND: Float32Array, config: Rq) -> dict[str, float]:
    """Fit on the sample, encode all."""
    with PeakMemory() as memory:
        books, fit_s = timed(lambda: fit_residual(x_ND, config))
        codes, encode_s = timed(lambda: books.encode(x_ND))
    used = min(len(np.unique(codes[:, level])) for level in range(config.num_levels))
    return {
        "fit_s": fit_s,
        "encode_per_s": len(x_ND) / encode_s,
        "mse": float(books.squared_errors(x_ND[:COMPARED_ROWS])[-1]),
        "min_utilisation": used / config.codebook_size,
        "peak_gib": memory.peak_gib,
    }


def measure_faiss(x_ND: Float32Array, config: Rq, beam: int) -> dict[str, float]:
    """Fit on the same sample; encode all for the error, a part of them for the clock."""
    bits = config.codebook_size.bit_length() - 1
    quantizer = faiss.ResidualQuantizer(DIM, config.num_levels, bits)
    quantizer.max_beam_size = beam
    sample = np.ascontiguousarray(x_ND[training_rows(len(x_ND), config)])
    with PeakMemory() as memory:
        _, fit_s = timed(lambda: quantizer.train(sample))
        part = x_ND[:COMPARED_ROWS]
        codes, encode_s = timed(lambda: quantizer.compute_codes(part))
    rebuilt = quantizer.decode(codes)
    return {
        "fit_s": fit_s,
        "encode_per_s": len(part) / encode_s,
        "mse": float(((part - rebuilt) ** 2).sum(1, dtype=np.float64).mean()),
        "peak_gib": memory.peak_gib,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200,000 vectors, K 256")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    num_items, config = (200_000, Rq(codebook_size=256)) if args.quick else (1_000_000, Rq())
    x_ND = clustered_vectors(num_items)
    with PeakMemory() as memory:
        time.sleep(0.5)
    console = Console()
    sides = {"braid": measure_ours(x_ND, config)}
    for beam in (1, 5):
        console.print({name: round(value, 5) for name, value in [*sides.values()][-1].items()})
        sides[f"faiss, max_beam_size {beam}"] = measure_faiss(x_ND, config, beam)
    title = f"{num_items:,} x {DIM}, L {config.num_levels} x K {config.codebook_size}"
    table = Table("side", "fit s", "encoded/s", "mse", "peak GiB", title=title)
    for name, side in sides.items():
        table.add_row(
            name,
            f"{side['fit_s']:.1f}",
            f"{side['encode_per_s']:,.0f}",
            f"{side['mse']:.5f}",
            f"{side['peak_gib']:.2f}",
        )
    console.print(table)
    faiss_sides = [side for name, side in sides.items() if name.startswith("faiss")]
    figures = {
        **sides["braid"],
        "faiss_mse": min(side["mse"] for side in faiss_sides),
        "num_items": num_items,
        "codebook_size": config.codebook_size,
        "num_levels": config.num_levels,
        "training_rows": len(training_rows(num_items, config)),
        "gib_before": memory.peak_gib,
        "sides": sides,
        **describe(),
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

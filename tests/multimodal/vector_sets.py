"""Small sets of item vectors."""

import numpy as np
import torch

from multimodal.codes.residual_quantizer import ResidualCodebooks
from multimodal.codes.vectors import Float32Array


def clustered(num_items: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> Float32Array:
    """Unit vectors around random centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    x = centres[rng.integers(0, clusters, num_items)] + 0.4 * rng.standard_normal((num_items, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def codeword_vectors(books: ResidualCodebooks) -> list[torch.Tensor]:
    """What every code of every level stands for: a (codes, D) matrix a level."""
    found = list(books.codebooks_LKD)
    if books.fsq:
        found.append(books.fsq.decode(torch.arange(books.fsq.num_codes)))
    return found

"""Small sets of item vectors."""

import numpy as np

from multimodal.vectors import Float32Array


def clustered(num_items: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> Float32Array:
    """Unit vectors around random centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((clusters, dim))
    x = centres[rng.integers(0, clusters, num_items)] + 0.4 * rng.standard_normal((num_items, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

"""K-means against loops and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from vector_sets import clustered

from multimodal.codes import kmeans
from multimodal.codes.kmeans import lloyd, nearest_codewords, principal_directions, repair


def test_nearest_codeword_equals_a_loop_over_distances() -> None:
    x, codebook = clustered(5000), clustered(37, seed=1)

    codes = nearest_codewords(torch.from_numpy(x), torch.from_numpy(codebook))

    expected = [int(np.argmin([((v - c) ** 2).sum() for c in codebook])) for v in x[:300]]
    assert codes[:300].tolist() == expected
    distances = ((x[:, None] - codebook[None]) ** 2).sum(2)
    assert codes.tolist() == distances.argmin(1).tolist()


def test_a_codebook_of_any_size_is_compared_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kmeans, "_MAX_SCORES", 100)
    x, codebook = torch.from_numpy(clustered(50)), torch.from_numpy(clustered(30, seed=1))
    made: list[int] = []
    product = torch.addmm

    def recorded(*args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        made.append(out.numel())
        return product(*args, out=out)

    monkeypatch.setattr(torch, "addmm", recorded)
    found = nearest_codewords(x, codebook)
    assert found.tolist() == torch.cdist(x, codebook).argmin(1).tolist()
    assert max(made) <= 100


def test_lloyd_finds_what_scikit_learn_finds_from_the_same_start() -> None:
    x = clustered(3000)
    start = x[:40].copy()

    ours = lloyd(torch.from_numpy(x), torch.from_numpy(start), 60).numpy()

    theirs = KMeans(40, init=start, n_init=1, max_iter=300, tol=0).fit(x)
    error = ((x - ours[nearest_codewords(torch.from_numpy(x), torch.from_numpy(ours))]) ** 2).sum()
    np.testing.assert_allclose(error, theirs.inertia_, rtol=0.01)


def test_repair_leaves_no_codeword_empty() -> None:
    x = torch.from_numpy(clustered(500))
    codebook = torch.cat([x[:3], torch.full((61, 16), 50.0)])

    repaired, codes = repair(x, codebook)

    assert len(codes.unique()) == 64
    assert torch.equal(codes, nearest_codewords(x, repaired))


def test_repair_stops_where_there_are_no_more_different_vectors() -> None:
    x = torch.from_numpy(clustered(5)).repeat(20, 1)

    repaired, codes = repair(x, torch.full((8, 16), 9.0))

    assert len(codes.unique()) == 5
    assert torch.equal(repaired[codes], x)


def test_principal_directions_are_those_of_the_covariance() -> None:
    x = clustered(2000)

    directions = principal_directions(torch.from_numpy(x)).numpy()

    covariance = np.cov(x.T)
    variances = np.diag(directions.T @ covariance @ directions)
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-3)
    np.testing.assert_allclose(directions.T @ directions, np.eye(16), atol=1e-5)

"""Residual K-means and FSQ against plain numpy, and against faiss."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from vector_sets import clustered, codeword_vectors

from embedding.errors import UserError
from multimodal.codes_config import Fsq, Rq, Streaming
from multimodal.residual_fit import fit_residual
from multimodal.residual_quantizer import ResidualCodebooks

CONFIG = Rq(num_levels=3, codebook_size=32)
RES_KMEANS_FSQ = Rq(num_levels=2, codebook_size=32, fsq=Fsq(num_directions=5))


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return clustered(6000)


@pytest.fixture(scope="module")
def books(x: np.ndarray) -> ResidualCodebooks:
    return fit_residual(x, CONFIG)


def naive_codes(x: np.ndarray, books: ResidualCodebooks) -> tuple[list[list[int]], np.ndarray]:
    codes, left = [], []
    for vector in x.astype(np.float64):
        rest, code = vector, []
        for codebook in books.codebooks_LKD.double().numpy():
            distances = [float(((rest - word) ** 2).sum()) for word in codebook]
            code.append(int(np.argmin(distances)))
            rest = rest - codebook[code[-1]]
        codes.append(code)
        left.append(rest)
    return codes, np.array(left)


def test_codes_and_reconstruction_equal_a_loop(x: np.ndarray, books: ResidualCodebooks) -> None:
    codes = books.encode(x)

    expected, left = naive_codes(x[:500], books)
    assert codes[:500].tolist() == expected
    np.testing.assert_allclose(x[:500] - books.decode(codes[:500]), left, atol=1e-5)


def test_errors_per_level_are_those_of_the_reconstructions(
    x: np.ndarray, books: ResidualCodebooks
) -> None:
    errors = books.squared_errors(x)

    codes, rebuilt, expected = books.encode(x), np.zeros_like(x), [(x**2).sum(1).mean()]
    for level, words in enumerate(codeword_vectors(books)):
        rebuilt = rebuilt + words.numpy()[codes[:, level]]
        expected.append(((x - rebuilt) ** 2).sum(1).mean())
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    assert (np.diff(errors) < 0).all()


def test_every_codeword_is_in_use(x: np.ndarray, books: ResidualCodebooks) -> None:
    codes = books.encode(x)
    assert [len(np.unique(codes[:, level])) for level in range(3)] == [32, 32, 32]


@pytest.mark.parametrize("beam", [1, 5])
def test_error_is_no_worse_than_that_of_faiss(beam: int) -> None:
    points = clustered(24_000, clusters=200)
    train, held_out = points[:20_000], points[20_000:]
    config = Rq(num_levels=3, codebook_size=64, points_per_codeword=320)  # all, like faiss
    ours, theirs = [], []
    for seed in range(2):
        quantizer = faiss.ResidualQuantizer(16, 3, 6)
        quantizer.max_beam_size, quantizer.cp.seed = beam, 1234 + seed
        quantizer.cp.max_points_per_centroid = 320
        quantizer.train(train)
        rebuilt = quantizer.decode(quantizer.compute_codes(held_out))
        theirs.append(((held_out - rebuilt) ** 2).sum(1).mean())
        books = fit_residual(train, config.model_copy(update={"seed": seed}))
        ours.append(books.squared_errors(held_out)[-1])

    assert np.mean(ours) <= np.mean(theirs)


def test_same_seed_gives_the_same_codebooks(x: np.ndarray, books: ResidualCodebooks) -> None:
    assert torch.equal(fit_residual(x, CONFIG).codebooks_LKD, books.codebooks_LKD)


def test_memory_mapped_vectors_and_half_precision_are_read_in_blocks(
    tmp_path: Path, x: np.ndarray, books: ResidualCodebooks
) -> None:
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    assert (books.encode(mapped) == books.encode(x.astype(np.float16))).all()


def test_streaming_over_all_vectors_improves_on_the_sample(x: np.ndarray) -> None:
    few = CONFIG.model_copy(update={"points_per_codeword": 10})
    on_sample = fit_residual(x, few)

    streaming = Streaming(num_passes=2, batch_size=1000)
    streamed = fit_residual(x, few.model_copy(update={"streaming": streaming}))

    assert streamed.squared_errors(x)[-1] < 0.97 * on_sample.squared_errors(x)[-1]


def test_fsq_codes_equal_the_formula(x: np.ndarray) -> None:
    books = fit_residual(x, RES_KMEANS_FSQ)
    assert books.fsq
    assert books.level_sizes == (32, 32, 32)

    codes = books.encode(x)

    _, left = naive_codes(x[:400], books)
    weights = books.fsq.weights_DP.numpy()
    for row, code in zip(left, codes[:400, 2], strict=True):
        z = [round(float(1 / (1 + np.exp(-(row @ w))))) for w in weights.T]
        assert code == sum(value * 2**p for p, value in enumerate(z))


@pytest.mark.parametrize("values", [2, 3, 4])
def test_fsq_values_are_the_means_of_what_they_stand_for(x: np.ndarray, values: int) -> None:
    fsq = Fsq(num_directions=4, values_per_direction=values)
    books = fit_residual(x, RES_KMEANS_FSQ.model_copy(update={"fsq": fsq}))
    assert books.fsq

    codes = books.encode(x)[:, 2]
    _, left = naive_codes(x, books)

    units = (books.fsq.weights_DP / books.fsq.weights_DP.norm(dim=0)).numpy()
    for direction in range(4):
        digit = codes // values**direction % values
        for value in range(values):
            mean = (left[digit == value] @ units[:, direction]).mean()
            assert float(books.fsq.values_PV[direction, value]) == pytest.approx(mean, abs=1e-4)
    errors = books.squared_errors(x)
    assert errors[3] < errors[2]


def test_fsq_reversed_and_reordered_is_the_same_quantizer(x: np.ndarray) -> None:
    books = fit_residual(x, RES_KMEANS_FSQ)
    assert books.fsq
    other = books.fsq.reordered(
        torch.tensor([2, 0, 1, 4, 3]), torch.tensor([True, False, True, False, True])
    )
    points = torch.from_numpy(x[:300])

    rebuilt = books.fsq.decode(books.fsq.encode(points))

    torch.testing.assert_close(other.decode(other.encode(points)), rebuilt)


def test_warm_start_moves_codewords_no_further_than_the_data_did(
    x: np.ndarray, books: ResidualCodebooks
) -> None:
    drifted = x + 0.02 * np.random.default_rng(5).standard_normal(x.shape, dtype=np.float32)

    warm = fit_residual(drifted, CONFIG, earlier=books).encode(x)
    cold = fit_residual(drifted, CONFIG.model_copy(update={"seed": 7})).encode(x)

    codes = books.encode(x)
    assert (warm[:, 0] == codes[:, 0]).mean() > 0.9
    assert (cold[:, 0] == codes[:, 0]).mean() < 0.3


def test_unusable_vectors_are_refused_with_a_remedy(
    x: np.ndarray, books: ResidualCodebooks
) -> None:
    broken = x.copy()
    broken[77, 3] = np.nan
    with pytest.raises(UserError, match="item vector 77 holds NaN"):
        fit_residual(broken, CONFIG)
    with pytest.raises(UserError, match="item vector 77 holds NaN"):
        books.encode(broken)
    with pytest.raises(UserError, match=r"all 50 item vectors are equal.*collapsed"):
        fit_residual(np.ones((50, 8), np.float32), CONFIG)
    with pytest.raises(UserError, match=r"codebook_size=32 .* there are 20; set it to 2"):
        fit_residual(x[:20], CONFIG)
    with pytest.raises(UserError, match="only 10 of the 200 item vectors differ"):
        fit_residual(np.tile(x[:10], (20, 1)), CONFIG)
    with pytest.raises(UserError, match="use num_levels=1"):
        fit_residual(x[:32], CONFIG)
    with pytest.raises(UserError, match="no item vectors"):
        fit_residual(x[:0], CONFIG)
    with pytest.raises(UserError, match="vectors of 16 dimensions, these have shape"):
        books.encode(x[:, :8])
    with pytest.raises(UserError, match="earlier codebooks have shape"):
        fit_residual(x, CONFIG.model_copy(update={"num_levels": 2}), earlier=books)
    with pytest.raises(UserError, match="vectors have 16 dimensions; use at most"):
        fit_residual(x, Rq(num_levels=2, codebook_size=8, fsq=Fsq(num_directions=17)))

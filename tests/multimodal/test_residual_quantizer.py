"""Residual K-means and FSQ against plain numpy, and against faiss."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from vector_sets import clustered, codeword_vectors

from embedding.errors import UserError
from multimodal.codes.config import Fsq, Rq, Streaming
from multimodal.codes.residual_fit import fit_residual, training_rows
from multimodal.codes.residual_quantizer import ResidualCodebooks

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


def by_cluster(points: np.ndarray) -> np.ndarray:
    """The same set, items of one cluster side by side, as items of one supplier lie by id."""
    nearest = fit_residual(points, Rq(num_levels=1, codebook_size=40)).encode(points)[:, 0]
    return points[np.argsort(nearest, kind="stable")]


@pytest.mark.parametrize("batch_size", [6000, 256, 32])
def test_a_stream_over_a_set_in_order_is_no_worse_than_the_sample(
    x: np.ndarray, batch_size: int
) -> None:
    """In such a set the first batches are all of one cluster: they must not take all codewords."""
    few = CONFIG.model_copy(update={"points_per_codeword": 10})
    ordered = by_cluster(x)
    on_sample = fit_residual(ordered, few).squared_errors(ordered)[-1]
    streaming = Streaming(num_passes=1, batch_size=batch_size)

    streamed = fit_residual(ordered, few.model_copy(update={"streaming": streaming}))

    assert streamed.squared_errors(ordered)[-1] < 0.98 * on_sample


def test_a_codeword_is_the_mean_of_the_sample_and_the_stream(x: np.ndarray) -> None:
    """One pass in one batch: what plain numpy gives for the weighted mean of both."""
    config = Rq(num_levels=1, codebook_size=8, points_per_codeword=40, seed=3)
    before = fit_residual(x, config)
    words = before.codebooks_LKD[0].numpy()
    in_sample = np.bincount(before.encode(x[training_rows(len(x), config)])[:, 0], minlength=8)
    own = before.encode(x)[:, 0]
    streaming = Streaming(num_passes=1, batch_size=len(x))

    after = fit_residual(x, config.model_copy(update={"streaming": streaming}))

    for code in range(8):
        members = x[own == code].astype(np.float64)
        both = in_sample[code] * words[code] + members.sum(axis=0)
        expected = both / (in_sample[code] + len(members))
        np.testing.assert_allclose(after.codebooks_LKD[0, code].numpy(), expected, atol=1e-5)


def test_a_stream_that_makes_it_worse_is_not_kept() -> None:
    """The sample is the whole set, and many rounds have fitted both levels to it together; batches
    of one vector move one level after the other."""
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((8, 4))
    points = (centres[np.arange(64) % 8] + rng.standard_normal((64, 4))).astype(np.float32)
    config = Rq(num_levels=2, codebook_size=8, points_per_codeword=8, refinement_rounds=30)
    best = fit_residual(points, config)

    streaming = Streaming(num_passes=3, batch_size=1)
    streamed = fit_residual(points, config.model_copy(update={"streaming": streaming}))

    assert streamed.squared_errors(points)[-1] <= best.squared_errors(points)[-1] * (1 + 1e-6)


def test_a_codeword_of_items_beyond_the_sample_stays(x: np.ndarray) -> None:
    """30 of 6,000 vectors lie far off, and the sample holds none of them: a refit with a stream
    sees them, so the codeword that the earlier codebooks had for them is no empty one."""
    config = Rq(num_levels=1, codebook_size=8, points_per_codeword=12, seed=1)
    rare = np.setdiff1d(np.arange(len(x)), training_rows(len(x), config))[:30]
    points = x.copy()
    points[rare] = 5 + 0.01 * x[rare]
    words = fit_residual(points, config).codebooks_LKD.clone()
    words[0, 2] = torch.full((16,), 5.0)
    earlier = ResidualCodebooks(words)

    streamed = config.model_copy(update={"streaming": Streaming(batch_size=500)})
    kept = fit_residual(points, streamed, earlier=earlier)
    lost = fit_residual(points, config, earlier=earlier)

    assert set(kept.encode(points[rare])[:, 0].tolist()) == {2}
    assert float((kept.codebooks_LKD[0, 2] - 5).abs().max()) < 0.1
    # Without the stream nobody has seen them, and the codeword goes where it is of use.
    assert float((lost.codebooks_LKD[0, 2] - 5).abs().max()) > 1


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

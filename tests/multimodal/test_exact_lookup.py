"""Codes are a matter of the vector and the codebook: near ties, equal codewords, any pieces."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from multimodal.codes import neighbours
from multimodal.codes.config import ExactIndex, Fsq, Rq, Vq
from multimodal.codes.exact_lookup import exact_codewords, exact_distances, exact_products
from multimodal.codes.fsq import FsqLevel
from multimodal.codes.kmeans import nearest_codewords
from multimodal.codes.neighbours import build_index, exact_order
from multimodal.codes.residual_fit import fit_residual
from multimodal.codes.residual_quantizer import CPU
from multimodal.codes.vector_quantizer import take_item_codebook
from multimodal.codes.vectors import unit_rows


def half_way(num: int, codewords: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vectors so close to the middle of two codewords that fp32 sums cannot tell which is nearer.

    On the line between both: no third one is near.
    """
    first, second = rng.integers(0, len(codewords), (2, num))
    middle = (codewords[first].astype(np.float64) + codewords[second]) / 2
    toward = (codewords[second] - codewords[first]) * rng.uniform(-1e-7, 1e-7, (num, 1))
    return (middle + toward).astype(np.float32)


def by_loop(x: np.ndarray, codewords: np.ndarray) -> list[int]:
    """The first of the nearest codewords, in fp64, a pair at a time."""
    found = []
    for row in x.astype(np.float64):
        distances = [sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in codewords]
        found.append(distances.index(min(distances)))
    return found


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_near_ties_are_decided_exactly(offset: float) -> None:
    rng = np.random.default_rng(0)
    # The corners of a cube: most vectors half-way between two are as near to others.
    codewords = (offset + rng.integers(0, 2, (24, 6)) + 0.1 * rng.standard_normal((24, 6))).astype(
        np.float32
    )
    codewords[[7, 13, 20]] = codewords[[2, 2, 5]]  # equal ones: the first has the code
    x = np.concatenate([half_way(300, codewords, rng), codewords])

    found = exact_codewords(torch.from_numpy(x), torch.from_numpy(codewords)).tolist()

    expected = by_loop(x, codewords)
    assert found == expected
    assert not {7, 13, 20} & {*found}
    assert found[-24:] == [2 if i in (7, 13) else 5 if i == 20 else i for i in range(24)]
    plain = nearest_codewords(torch.from_numpy(x), torch.from_numpy(codewords)).tolist()
    assert plain != expected  # these vectors are what they should be


def test_codes_do_not_depend_on_the_piece() -> None:
    rng = np.random.default_rng(1)
    cloud = rng.standard_normal((3000, 33)).astype(np.float32)
    books = fit_residual(cloud, Rq(num_levels=2, codebook_size=64, fsq=Fsq(num_directions=6)))
    first = books.codebooks_LKD[0].numpy()
    assert books.fsq
    # On the first level half-way, on the second one, or on a border of the FSQ level.
    on_border = (
        books.decode(books.encode(cloud[:200]))
        - books.fsq.decode(
            torch.from_numpy(books.encode(cloud[:200])[:, 2].astype(np.int64))
        ).numpy()
    )
    x = np.concatenate([half_way(700, first, rng), on_border, cloud[:500]])

    whole = books.encode(x)

    for size in (1, 7, 256):
        pieces = [books.encode(x[i : i + size]) for i in range(0, len(x), size)]
        assert np.array_equal(np.concatenate(pieces), whole)
    order = rng.permutation(len(x))
    assert np.array_equal(books.encode(x[order]), whole[order])
    assert np.array_equal(books.errors_of_codes(x, whole), books.squared_errors(x))


def test_a_projection_on_the_border_of_fsq_is_taken_exactly() -> None:
    rng = np.random.default_rng(2)
    weights_DP = torch.linalg.qr(torch.from_numpy(rng.standard_normal((40, 3)))).Q.float()
    fsq = FsqLevel(weights_DP, torch.tensor([[-1.0, 1.0]] * 3))
    rows = rng.standard_normal((400, 40))
    w = weights_DP.numpy().astype(np.float64)
    # Projected out as far as fp32 can say it: what is left of the projection is about 1e-8.
    x = (rows - rows @ w @ np.linalg.inv(w.T @ w) @ w.T).astype(np.float32)

    found = fsq.encode(torch.from_numpy(x)).tolist()

    expected = []
    for row in x.astype(np.float64):
        signs = [sum(a * b for a, b in zip(row, w[:, p], strict=True)) > 0 for p in range(3)]
        expected.append(sum(2**p for p in range(3) if signs[p]))
    assert found == expected
    assert len({*found}) == 8
    assert [int(fsq.encode(torch.from_numpy(row[None]))) for row in x] == expected


def test_neighbours_do_not_depend_on_the_piece() -> None:
    """Many items a rounding error apart, and more equal ones than a code lists."""
    rng = np.random.default_rng(3)
    crowd = rng.standard_normal(24) + 1e-7 * rng.standard_normal((60, 24))
    x = np.concatenate([rng.standard_normal((240, 24)), crowd, np.ones((40, 24))])
    x = rng.permutation(x.astype(np.float32))
    book = take_item_codebook(np.arange(len(x)), x)
    near = book.neighbours(Vq(top_k=5, index=ExactIndex()))
    own = np.where(np.arange(len(x)) % 4 > 0, np.arange(len(x)), -1)

    whole = near.encode(x, own)

    items = book.vectors_ND.astype(np.float64)
    for at in range(0, len(x), 3):
        products = [0.0] * len(items)
        for d in range(24):  # summed in the order of the dimensions
            factor = float(x[at, d])
            products = [p + factor * i[d] for p, i in zip(products, items, strict=True)]
        ranked = sorted(range(len(x)), key=lambda i: (-products[i], i))
        assert whole[at].tolist() == [i for i in ranked if i != own[at]][:5]
    for size in (1, 10):
        pieces = [near.encode(x[i : i + size], own[i : i + size]) for i in range(0, 340, size)]
        assert np.array_equal(np.concatenate(pieces), whole)


def test_a_crowd_of_items_is_put_in_order_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near ties widen a search, at the worst to all items: memory stays bounded all the same."""
    rng = np.random.default_rng(0)
    crowd = rng.standard_normal(16) + 1e-7 * rng.standard_normal((300, 16))
    x = unit_rows(np.concatenate([rng.standard_normal((300, 16)), crowd]).astype(np.float32))
    index = build_index(x, ExactIndex(), CPU)
    whole = exact_order(index, x, x, 5)
    pairs: list[int] = []

    def counted(*args: Any) -> Tensor:
        pairs.append(len(args[1]))
        return exact_products(*args)

    monkeypatch.setattr(neighbours, "exact_products", counted)
    monkeypatch.setattr(neighbours, "_MAX_CANDIDATES", 5000)
    assert np.array_equal(exact_order(index, x, x, 5), whole)
    assert 0 < max(pairs) <= 5000
    expected = np.lexsort((np.tile(np.arange(600), (600, 1)), -(x.astype(np.float64) @ x.T)))[:, :5]
    others = np.arange(300)
    assert np.array_equal(whole[others], expected[others])


def test_distances_of_no_pairs() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert exact_distances(torch.ones(2, 3), none, torch.ones(2, 3), none).tolist() == []

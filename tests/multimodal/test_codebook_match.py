"""Refits: permuted codebooks are recognised, drifted ones keep codes, rows follow."""

from itertools import permutations
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from vector_sets import clustered, codeword_vectors

from multimodal.codes import vector_quantizer
from multimodal.codes.config import Codes, Fsq, RefitPolicy, Rq, Vq
from multimodal.codes.match import align, carry_items, match_codewords
from multimodal.codes.metrics import stability
from multimodal.codes.refit import refit
from multimodal.codes.residual_fit import codebooks_in_space, fit_residual
from multimodal.codes.residual_quantizer import ResidualCodebooks
from multimodal.codes.store import Codebooks
from multimodal.codes.vector_quantizer import FREE, take_item_codebook

RQ = Rq(num_levels=3, codebook_size=32)
FSQ = Rq(num_levels=2, codebook_size=32, fsq=Fsq(num_directions=5))


def permuted(books: ResidualCodebooks, seed: int) -> ResidualCodebooks:
    generator = torch.Generator().manual_seed(seed)
    codebooks = [
        book[torch.randperm(len(book), generator=generator)] for book in books.codebooks_LKD
    ]
    fsq = books.fsq
    if fsq:
        directions = torch.randperm(len(fsq.values_PV), generator=generator)
        flip = torch.rand(len(directions), generator=generator) < 0.5
        fsq = fsq.reordered(directions, flip)
    return ResidualCodebooks(torch.stack(codebooks), fsq)


def test_matching_is_the_best_of_all_permutations() -> None:
    rng = torch.Generator().manual_seed(0)
    before, after = torch.randn(6, 3, generator=rng), torch.randn(6, 3, generator=rng)

    _, new = match_codewords(before, after)

    def cost(order: tuple[int, ...]) -> float:
        return sum(float((before[i] - after[j]).norm()) for i, j in enumerate(order))

    assert tuple(new.tolist()) == min(permutations(range(6)), key=cost)


@pytest.mark.parametrize("config", [RQ, FSQ], ids=["rq", "res-kmeans-fsq"])
def test_a_permuted_refit_is_recognised_exactly(config: Rq) -> None:
    x = clustered(4000)
    books = fit_residual(x, config)
    shuffled = permuted(books, seed=3)
    assert (shuffled.encode(x) != books.encode(x)).mean() > 0.8

    aligned, carries = align(books, shuffled)

    assert (aligned.encode(x) == books.encode(x)).all()
    for level, carry in enumerate(carries):
        assert carry.carried_K.all()
        assert carry.source_K.tolist() == list(range(books.level_sizes[level]))


def test_a_refit_of_drifted_items_keeps_codes_and_without_the_old_ones_it_does_not() -> None:
    x = clustered(4000, clusters=100)
    rng = np.random.default_rng(1)
    # Births, deaths and a little movement.
    moved = np.concatenate([x[400:], clustered(400, clusters=100, seed=8)])
    moved = moved + 0.02 * rng.standard_normal(moved.shape, dtype=np.float32)
    config = Codes(rq=RQ, vq=None)
    before = refit(config, np.arange(4000), x).codebooks
    assert before.residual

    after = refit(config, np.arange(400, 4400), moved, before)
    renumbered = refit(
        config.model_copy(update={"refit": RefitPolicy(keep_meaning=False)}),
        np.arange(400, 4400),
        moved,
        before,
    )

    assert after.codebooks.residual
    assert renumbered.codebooks.residual
    codes = before.residual.encode(x[400:])
    kept = stability(codes, after.codebooks.residual.encode(moved[:3600]))
    lost = stability(codes, renumbered.codebooks.residual.encode(moved[:3600]))
    assert kept.levels[0] > 0.9
    assert kept.full > 0.5
    assert lost.levels[0] < 0.2
    assert all(carry.share_carried > 0.9 for carry in after.carries.values())
    assert all((carry.source_K == -1).all() for carry in renumbered.carries.values())
    # Nothing is paid for it: the error is that of a fit from scratch.
    error = after.codebooks.residual.squared_errors(moved)[-1]
    assert error < 1.01 * renumbered.codebooks.residual.squared_errors(moved)[-1]


@pytest.mark.parametrize("size", [24, 40])
def test_codebooks_of_another_size_take_rows_by_meaning(size: int) -> None:
    x = clustered(4000)
    before = fit_residual(x, RQ)
    after = fit_residual(x, RQ.model_copy(update={"codebook_size": size, "num_levels": 2}))

    aligned, carries = align(before, after)

    assert {tuple(row) for row in aligned.codebooks_LKD[0].tolist()} == {
        tuple(row) for row in after.codebooks_LKD[0].tolist()
    }
    for level, carry in enumerate(carries):
        old, new = before.codebooks_LKD[level].numpy(), aligned.codebooks_LKD[level].numpy()
        nearest = [int(np.argmin(((old - word) ** 2).sum(1))) for word in new]
        assert carry.source_K.tolist() == nearest
        assert carry.carried_K.sum() <= min(size, 32)
        assert len(set(carry.source_K[carry.carried_K])) == carry.carried_K.sum()


def test_more_levels_than_before_start_fresh() -> None:
    x = clustered(2000)
    shorter = fit_residual(x, RQ.model_copy(update={"num_levels": 1}))
    _, carries = align(shorter, fit_residual(x, FSQ))
    assert [bool((carry.source_K == -1).all()) for carry in carries] == [False, True, True]


def test_fsq_codes_of_another_size_start_from_the_nearest() -> None:
    x = clustered(2000)
    before, after = (
        fit_residual(x, FSQ),
        fit_residual(x, FSQ.model_copy(update={"fsq": Fsq(num_directions=4)})),
    )
    aligned, carries = align(before, after)
    old, new = codeword_vectors(before)[-1].numpy(), codeword_vectors(aligned)[-1].numpy()
    assert not carries[-1].carried_K.any()
    chosen = ((old[carries[-1].source_K] - new) ** 2).sum(1)
    np.testing.assert_allclose(chosen, ((new[:, None] - old) ** 2).sum(2).min(1), atol=1e-5)


def test_rows_of_the_vq_table_stay_with_their_items() -> None:
    x = clustered(8)
    before = take_item_codebook(np.array([10, 11, 12, 13]), x[:4])
    twin_of_11 = np.concatenate([x[[0, 3]], x[1:2] * 3, x[5:7]])
    after = take_item_codebook(np.array([10, 13, 20, 21, 22]), twin_of_11, before)
    assert after.item_ids_N.tolist() == [10, 20, 21, 13, 22]

    carry = carry_items(before, after, Vq())

    assert carry.carried_K.tolist() == [True, False, False, True, False]
    similar = x[:4] @ x[[5, 6]].T
    assert carry.source_K.tolist() == [0, 1, similar[:, 0].argmax(), 3, similar[:, 1].argmax()]
    emptied = take_item_codebook(np.array([12]), x[2:3], before)
    assert carry_items(before, emptied, Vq()).source_K.tolist() == [-1, -1, 2, -1]
    assert emptied.item_ids_N.tolist() == [FREE, FREE, 12, FREE]


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_start_rows_of_new_items_are_found_as_codes_are(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = clustered(3000)
    index = Vq.model_validate({"top_k": 7, "index": {"kind": kind}}).index
    before = take_item_codebook(np.arange(2500), x[:2500])
    after = take_item_codebook(np.arange(3000), x, before)
    built = Mock(wraps=vector_quantizer.build_index)
    monkeypatch.setattr(vector_quantizer, "build_index", built)

    carry = carry_items(before, after, Vq(top_k=7, index=index))

    assert [call.args[1] for call in built.call_args_list] == [index]
    found = carry.source_K[2500:]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit[2500:] @ unit[:2500].T
    best, own = similarity.max(axis=1), similarity[np.arange(500), found]
    assert (own == best).mean() > (0.999 if kind == "exact" else 0.8)
    assert not carry.carried_K[2500:].any()


def test_codes_keep_their_meaning_through_a_new_encoder() -> None:
    x = clustered(4000, clusters=100)
    books = fit_residual(x, RQ)
    codes = books.encode(x)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((16, 16)))
    rotated = (x @ rotation).astype(np.float32)
    config = Codes(rq=RQ, vq=Vq(top_k=3))

    before = Codebooks(residual=codebooks_in_space(codes, rotated, RQ))
    after = refit(config, np.arange(4000), rotated, before).codebooks

    assert after.residual
    naive = refit(config, np.arange(4000), rotated, Codebooks(residual=books)).codebooks
    assert naive.residual
    assert stability(codes, after.residual.encode(rotated)).levels[0] > 0.9
    assert stability(codes, naive.residual.encode(rotated)).levels[0] < 0.3

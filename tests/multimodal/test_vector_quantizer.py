"""VQ codes against a loop, and what a refit does to slots."""

import numpy as np
import pytest
from vector_sets import clustered

from embedding.errors import UserError
from multimodal.codes.config import ExactIndex, HnswIndex, IndexBySize, IvfIndex, Vq, VqIndex
from multimodal.codes.neighbours import ExactSearch
from multimodal.codes.vector_quantizer import FREE, take_item_codebook

IDS = np.arange(100, 2100)


@pytest.mark.parametrize("num_items", [150, 4000])
def test_codes_are_the_nearest_items_by_cosine(num_items: int) -> None:
    x = clustered(num_items) * np.linspace(0.5, 2, num_items, dtype=np.float32)[:, None]
    book = take_item_codebook(np.arange(num_items), x)

    near = book.neighbours(Vq(top_k=7, index=ExactIndex()))
    own = np.where(np.arange(50) % 3 > 0, np.arange(50), FREE)  # a third is not in the set
    codes, others = near.encode(x[:50]), near.encode(x[:50], own)

    for at, row in enumerate(x[:50]):
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in x]
        ranked = sorted(range(num_items), key=lambda i: -cosines[i])
        assert codes[at].tolist() == ranked[:7]
        assert others[at].tolist() == [i for i in ranked if i != own[at]][:7]


def test_an_item_leaves_itself_out_wherever_it_stands_among_equals() -> None:
    x = np.repeat(clustered(5), 4, axis=0)
    near = take_item_codebook(np.arange(20), x).neighbours(Vq(top_k=3))
    codes = near.encode(x, np.arange(20))
    expected = [[4 * (i // 4) + j for j in range(4) if j != i % 4] for i in range(20)]
    assert codes.tolist() == expected


def test_an_exact_search_holds_the_vectors_of_the_codebook_and_no_copy() -> None:
    book = take_item_codebook(np.arange(50), 3 * clustered(50))
    near = book.neighbours(Vq(top_k=3, index=ExactIndex()))
    assert isinstance(near.index, ExactSearch)
    assert np.shares_memory(near.index.items_ND.numpy(), book.vectors_ND)
    assert np.shares_memory(near.vectors_ND, book.vectors_ND)


def test_slots_of_items() -> None:
    book = take_item_codebook(np.array([7, 3, 9]), clustered(3))
    shrunk = take_item_codebook(np.array([9, 3]), clustered(2), book)
    assert book.slots_of(np.array([9, 1, 7, 3, 99])).tolist() == [2, FREE, 0, 1, FREE]
    assert shrunk.slots_of(np.array([7, 9, FREE])).tolist() == [FREE, 2, FREE]


def test_equal_items_are_listed_in_the_order_of_their_slots() -> None:
    x = np.repeat(clustered(5), 4, axis=0)
    codes = take_item_codebook(np.arange(20), x).neighbours(Vq(top_k=4)).encode(x)
    assert codes.tolist() == [[4 * (i // 4) + j for j in range(4)] for i in range(20)]


@pytest.mark.parametrize(
    "index", [IvfIndex(), HnswIndex(), IndexBySize(exact_up_to_items=100)], ids=lambda i: i.kind
)
def test_approximate_indexes_find_most_of_the_exact_neighbours(index: VqIndex) -> None:
    x = clustered(4000)
    book = take_item_codebook(np.arange(4000), x)
    exact = book.neighbours(Vq(top_k=10, index=ExactIndex())).encode(x)

    found = book.neighbours(Vq(top_k=10, index=index)).encode(x)

    shared = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True))
    assert shared / exact.size > 0.9


def test_fewer_items_than_neighbours_leaves_free_codes() -> None:
    codes = (
        take_item_codebook(np.arange(3), clustered(3)).neighbours(Vq(top_k=5)).encode(clustered(3))
    )
    assert (codes[:, 3:] == FREE).all()
    assert sorted(codes[0, :3].tolist()) == [0, 1, 2]
    two = take_item_codebook(np.arange(2), clustered(2)).neighbours(Vq(top_k=3))
    assert two.encode(clustered(2), np.array([0, 1])).tolist() == [[1, FREE, FREE], [0, FREE, FREE]]


def test_items_keep_their_slots_and_new_ones_take_those_of_the_gone() -> None:
    x = clustered(2000)
    before = take_item_codebook(IDS[:6], x[:6])
    ids = np.array([105, 900, 103, 901, 902, 101])  # 100, 102 and 104 are gone
    after = take_item_codebook(ids, x[10:16], before)
    assert after.item_ids_N.tolist() == [900, 101, 901, 103, 902, 105]
    np.testing.assert_allclose(after.vectors_ND[3], x[12], atol=1e-6)

    shrunk = take_item_codebook(np.array([104]), x[:1] + 1, before)
    assert shrunk.item_ids_N.tolist() == [FREE, FREE, FREE, FREE, 104, FREE]
    assert shrunk.neighbours(Vq(top_k=2)).encode(x[:1]).tolist() == [[4, FREE]]

    grown = take_item_codebook(IDS[:9], x[:9], before)
    assert grown.item_ids_N.tolist() == IDS[:9].tolist()


def test_an_item_with_two_vectors_is_refused() -> None:
    with pytest.raises(UserError, match=r"item 7 2 times.*give every item one vector"):
        take_item_codebook(np.array([7, 8, 7]), clustered(3))

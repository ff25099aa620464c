"""Codes configuration: sizes, limits and what the errors tell."""

import pytest
from pydantic import ValidationError

from multimodal.codes.config import Codes, Fsq, Rq, Suffix, suggested_codebook_size


def test_level_sizes_count_the_fsq_level() -> None:
    assert Rq(num_levels=3, codebook_size=8).level_sizes == (8, 8, 8)
    assert Rq(num_levels=2, codebook_size=8, fsq=Fsq()).level_sizes == (8, 8, 2**13)


def test_fewer_items_than_codewords_names_a_size_that_fits() -> None:
    with pytest.raises(ValueError, match=r"codebook_size=1024 .* there are 100; set it to 4 or"):
        Rq().for_items(100)
    assert Rq(codebook_size=64).for_items(64).codebook_size == 64


@pytest.mark.parametrize(("items", "size"), [(1, 2), (31, 2), (32, 2), (64, 4), (1682, 64)])
def test_suggested_size_leaves_sixteen_items_a_codeword(items: int, size: int) -> None:
    assert suggested_codebook_size(items) == size


def test_parts_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="keep at least one"):
        Codes(vq=None, rq=None)
    with pytest.raises(ValidationError, match="set rq or remove suffix"):
        Codes(rq=None, suffix=Suffix())
    with pytest.raises(ValidationError, match="67108864 codes, more than"):
        Fsq(num_directions=13, values_per_direction=4)
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        Codes.model_validate({"vq": {"index": {"kind": "annoy"}}})

"""Stored tokens come back exactly, and damage is named with the remedy."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from multimodal.stored_content import (
    NO_CONTENT,
    ContentReader,
    Places,
    StoredContent,
    StoredModality,
    write_index,
)
from multimodal.token_store import NO_ROW, PartTokens, TokenStore, check_part, damaged_parts

WIDTH = 3


def part(first: int, lengths: list[int], faults: list[str | None] | None = None) -> PartTokens:
    """Items first, first + 1, ...; token values are distinct."""
    faults = faults or [None] * len(lengths)
    ids = np.arange(first, first + len(faults))
    longest = max(lengths)
    values = torch.arange(len(lengths) * longest * WIDTH, dtype=torch.float32)
    tokens = (values + 1000 * first).reshape(len(lengths), longest, WIDTH)
    return PartTokens(ids, ids * 7, faults, tokens, torch.tensor(lengths), [False] * len(lengths))


def store_at(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "text-f", "f", "float32")


def reader_of(tmp_path: Path, parts: list[PartTokens], precision: str = "float32") -> ContentReader:
    """An index over parts of one modality, items in the order of their ids."""
    store = TokenStore(tmp_path / "text-f", "f", precision)
    names = [store.append(p) for p in parts]
    entries = store.entries().to_pandas().sort_values("item_id")
    part_N = np.array([names.index(name) for name in entries["part"]])
    row_N = entries["row"].to_numpy()
    places = Places(np.where(row_N == NO_ROW, NO_ROW, part_N), row_N, entries["length"])
    stored = StoredModality(
        store="text-f", fingerprint="f", precision=precision, hidden_size=WIDTH, parts=tuple(names)
    )
    directory = tmp_path / "index"
    directory.mkdir()
    ids_N = entries["item_id"].to_numpy()
    content = StoredContent(num_items=len(ids_N), modalities={"text": stored})
    write_index(directory, ids_N, content, {"text": places})
    return ContentReader(directory, tmp_path)


def test_tokens_of_several_parts_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    first = part(10, [2, 4, 1])
    second = part(20, [3, 1], [None, "missing", None])
    reader = reader_of(tmp_path, [first, second])
    rows_U = reader.rows_of(np.array([22, 10, 99, 21, 11, 22]))
    assert rows_U.tolist() == [5, 0, NO_CONTENT, 4, 1, 5]
    tokens = reader.read(torch.from_numpy(rows_U)).modalities["text"]
    lengths = [1, 2, 0, 0, 4, 1]
    assert tokens.mask_UL.tolist() == [[i < n for i in range(4)] for n in lengths]
    expected = [second.tokens_MLH[1], first.tokens_MLH[0], None, None, first.tokens_MLH[1]]
    for row, (values, length) in enumerate(zip(expected, lengths, strict=False)):
        if values is not None:
            torch.testing.assert_close(tokens.tokens_ULH[row, :length], values[:length])
    assert torch.equal(tokens.tokens_ULH[5], tokens.tokens_ULH[0])


def test_nothing_to_read_still_has_one_position(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, [part(1, [2])])
    for rows in ([], [NO_CONTENT]):
        tokens = reader.read(torch.tensor(rows, dtype=torch.int64)).modalities["text"]
        assert tokens.tokens_ULH.shape == (len(rows), 1, WIDTH)
        assert not tokens.mask_UL.any()


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_values_are_those_rounded_once_when_they_were_stored(
    tmp_path: Path, precision: str
) -> None:
    original = part(1, [2, 2])
    original.tokens_MLH.div_(7)
    reader = reader_of(tmp_path, [original], precision)
    read = [reader.read(torch.tensor([0, 1])).modalities["text"].tokens_ULH for _ in range(2)]
    assert torch.equal(*read)
    assert torch.equal(read[0], original.tokens_MLH.to(getattr(torch, precision)))


def test_entries_accumulate_and_survive_reopening(tmp_path: Path) -> None:
    store_at(tmp_path).append(part(1, [2, 1], ["damaged", None, None]))
    store_at(tmp_path).append(part(5, [1]))
    entries = store_at(tmp_path).entries().sort_by("item_id").to_pydict()
    assert entries["item_id"] == [1, 2, 3, 5]
    assert entries["digest"] == [7, 14, 21, 35]
    assert entries["row"] == [NO_ROW, 0, 1, 0]
    assert entries["length"] == [0, 2, 1, 1]
    assert entries["fault"] == ["damaged", None, None, None]


def test_an_empty_store_has_no_entries(tmp_path: Path) -> None:
    assert store_at(tmp_path).entries().num_rows == 0


def test_what_a_killed_process_left_is_no_entry_and_goes(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    kept = store.append(part(1, [1]))
    lost = store.append(part(2, [1]))
    (store.directory / f"{lost}.parquet").unlink()
    (store.directory / "part-x.partial").write_bytes(b"half")
    assert store.entries().num_rows == 1
    assert store.remove_unfinished() == 2
    assert {path.stem for path in store.directory.glob("part-*")} == {kept}


def test_a_store_of_another_tower_is_refused(tmp_path: Path) -> None:
    store_at(tmp_path)
    with pytest.raises(UserError, match="of tower f, not of g; delete it"):
        TokenStore(tmp_path / "text-f", "g", "float32")


def test_damage_is_found_and_says_which_files_to_delete(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    name = store.append(part(1, [2, 2]))
    path = store.directory / f"{name}.safetensors"
    sound = path.read_bytes()
    assert store.check([name]) == 1
    damages = {
        "checksum differs": sound[:-1] + bytes([sound[-1] ^ 1]),
        "not as many as were written": sound[:-5],
    }
    for why, content in damages.items():
        path.write_bytes(content)
        touch(path)
        with pytest.raises(UserError, match=rf"{why}.*delete {name}\.\* there.*content/"):
            store.check([name])
    with pytest.raises(UserError, match=rf"damaged.*delete {name}\.\*"):
        store.open(name)
    path.unlink()
    for look in (lambda: store.check([name]), lambda: store.open(name)):
        with pytest.raises(UserError, match=rf"delete {name}\.\*"):
            look()
    (store.directory / f"{name}.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=rf"{name}\.parquet of the token store is damaged"):
        store.entries()


def test_a_part_is_read_once_for_its_checksum(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    names = [store.append(part(first, [2, 2])) for first in (1, 5)]
    assert store.check(names) == 2
    assert store.check(names) == 0
    assert store_at(tmp_path).check([*names, store.append(part(9, [1]))]) == 1, "the new one"

    touch(store.directory / f"{names[0]}.safetensors")
    assert store.check(names) == 1
    assert store.check(names) == 0
    (store.directory / "sound.json").write_text("{")
    assert store.check(names) == 2


def test_a_damaged_part_stays_damaged_and_the_others_are_not_read_again(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    names = [store.append(part(first, [2, 2])) for first in (1, 5)]
    path = store.directory / f"{names[1]}.safetensors"
    flip_last_bit(path)
    for _ in range(2):
        with pytest.raises(UserError, match="checksum differs"):
            store.check(names)
    flip_last_bit(path)
    assert store.check(names) == 1


def test_parts_may_be_read_by_others_in_any_order(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    names = [store.append(part(first, [2, 2])) for first in (1, 5, 9, 13)]
    assert store.check(names[:1]) == 1
    path = store.directory / f"{names[1]}.safetensors"
    flip_last_bit(path)
    asked: list[list[str]] = []

    def elsewhere(parts: list[str]) -> Iterator[tuple[str, str | None]]:
        asked.append(parts)
        yield from (check_part(name, store.directory) for name in reversed(parts))

    with pytest.raises(UserError, match=rf"{names[1]}.*checksum differs"):
        store.check(names, elsewhere)
    flip_last_bit(path)
    assert store.check(names, elsewhere) == 1
    assert asked == [names[1:], [names[1]]]


def test_damage_that_left_size_and_time_as_they_were_is_found_when_all_is_read(
    tmp_path: Path,
) -> None:
    store = store_at(tmp_path)
    sound, other, gone = (store.append(part(first, [2, 2])) for first in (1, 5, 9))
    assert store.check([sound, other, gone]) == 3
    assert damaged_parts(store.directory) == []
    path = store.directory / f"{other}.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip_last_bit(path)
    os.utime(path, ns=times)
    (store.directory / f"{gone}.safetensors").unlink()

    assert store.check([sound, other]) == 0
    found = sorted(str(fault) for fault in damaged_parts(store.directory))

    expected = sorted([f"{other}.*checksum differs", f"{gone}.*it is not there"])
    assert len(found) == 2
    for fault, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, fault)


def touch(path: Path) -> None:
    """Another time of change; two writes in a row may have the same one."""
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


def flip_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    touch(path)


def test_a_damaged_part_is_named_when_it_is_read(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, [part(1, [2])])
    path = next((tmp_path / "text-f").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="token store is damaged"):
        reader.read(torch.tensor([0]))

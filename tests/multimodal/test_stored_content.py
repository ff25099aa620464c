"""The index of a day's content over its token stores, and the reader of training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from multimodal import stored_content, token_store
from multimodal.stored_content import (
    ContentReader,
    Places,
    StoredContent,
    StoredModality,
    write_index,
)
from multimodal.token_store import PartTokens, TokenStore

NUM_TOKENS, WIDTH = 3, 2


def write_content(root: Path, num_parts: int, *, tower: str = "a") -> Path:
    """An index of two texts a part, item `i` of tokens `i`; the stores lie beside it."""
    store = TokenStore(root / "stores" / tower, tower, "float32")
    ids = np.arange(2 * num_parts)
    parts = []
    for part in range(num_parts):
        own = ids[2 * part : 2 * part + 2]
        values = torch.from_numpy(own).float()[:, None, None].expand(-1, NUM_TOKENS, WIDTH)
        lengths = torch.full((2,), NUM_TOKENS)
        parts.append(
            store.append(PartTokens(own, own, [None, None], values, lengths, [False, False]))
        )
    index = root / f"index-{tower}-{num_parts}"
    index.mkdir()
    stored = StoredModality(
        store=tower, fingerprint=tower, precision="float32", hidden_size=WIDTH, parts=tuple(parts)
    )
    places = Places(ids // 2, ids % 2, np.full(len(ids), NUM_TOKENS))
    content = StoredContent(num_items=len(ids), modalities={"text": stored})
    write_index(index, ids, content, {"text": places})
    return index


def test_a_reader_tells_other_items_and_other_tokens_apart(tmp_path: Path) -> None:
    found = {
        ContentReader(write_content(tmp_path, count, tower=tower), tmp_path / "stores").identity
        for count, tower in ((1, "a"), (2, "a"), (2, "b"))
    }
    assert len(found) == 3
    again = ContentReader(tmp_path / "index-a-2", tmp_path / "stores")
    assert again.identity in found


def test_parts_are_open_as_long_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_content(tmp_path, 5)
    opened: list[str] = []
    open_part = TokenStore.open

    def counted(store: TokenStore, name: str) -> torch.Tensor:
        opened.append(name)
        return open_part(store, name)

    monkeypatch.setattr(TokenStore, "open", counted)
    monkeypatch.setattr(stored_content, "_MOST_OPEN", 2)
    reader = ContentReader(index, tmp_path / "stores")

    def read(*rows: int) -> list[float]:
        tokens_ULH = reader.read(torch.tensor(rows)).modalities["text"].tokens_ULH
        assert tokens_ULH.shape == (len(rows), NUM_TOKENS, WIDTH)
        values: list[float] = tokens_ULH.mean(dim=(1, 2)).tolist()
        return values

    assert opened == []
    assert read(3, 2, 0) == [3, 2, 0]
    assert len(opened) == 2
    assert read(1, 3) == [1, 3]
    assert len(opened) == 2
    assert read(9, 7, 5, 3, 1) == [9, 7, 5, 3, 1]
    parts = reader.content.modalities["text"].parts
    assert set(opened) == {*parts}
    assert len(opened) == len(parts)
    assert read(1) == [1]
    assert opened[5:] == [parts[0]], "of five parts no more than two stay open"


def test_too_many_mappings_are_named_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ContentReader(write_content(tmp_path, 1), tmp_path / "stores")

    def full(*_: object, **__: object) -> None:
        raise MemoryError("Cannot allocate memory")

    monkeypatch.setattr(token_store, "safe_open", full)
    with pytest.raises(UserError, match=r"too many files mapped.*content\.tokens\.items_per_part"):
        reader.read(torch.tensor([0]))

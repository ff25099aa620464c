"""The index of a day's content over its token stores, and the reader of training."""

from pathlib import Path

import numpy as np
import torch

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


def test_a_reader_tells_towers_apart_whatever_items_it_reads(tmp_path: Path) -> None:
    one, more, other = (
        ContentReader(write_content(tmp_path, count, tower=tower), tmp_path / "stores")
        for count, tower in ((1, "a"), (2, "a"), (2, "b"))
    )
    assert one.towers == more.towers != other.towers
    assert one.identity != more.identity

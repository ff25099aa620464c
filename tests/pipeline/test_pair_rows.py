"""Pairs on disk against all of them in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from multimodal.codes import pair_sampler
from multimodal.codes.pair_sampler import PairSampler
from pipeline.codes import pair_rows
from pipeline.codes.pair_rows import read_pair_rows, write_pair_rows

CONTENT = np.array([3, 5, 8, 13, 21, 34, 55, 2**62])
"""Raw ids by content row."""
COLUMNS = {"item2item": ("item", "neighbour"), "user2item": ("trigger", "target")}


def mined(folder: Path, parts: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Parts of random pairs, some of them of items without content; the pairs by source."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([CONTENT, [4, 2**62 + 1]])
    found: dict[str, list[tuple[int, int]]] = {}
    for source, count in parts.items():
        (folder / source).mkdir(parents=True)
        for part in range(count):
            pairs = rng.choice(ids, (300 + part, 2))
            names = COLUMNS[source]
            table = {"similarity": rng.random(len(pairs))} | dict(zip(names, pairs.T, strict=True))
            pq.write_table(pa.table(table), folder / source / f"part-{part:04d}.parquet")
            found.setdefault(source, []).extend(map(tuple, pairs.tolist()))
    return found


class InMemory:
    """Draws and shares as a function of all pairs."""

    def __init__(self, kinds: list[tuple[Tensor, Tensor]], num_items: int, seed: int) -> None:
        self.kinds, self.seed = kinds, seed
        share_2N = torch.zeros(2, num_items, dtype=torch.float64)
        for sides in kinds:
            for share_N, item_P in zip(share_2N, sides, strict=True):
                share_N += torch.bincount(item_P, minlength=num_items) / len(item_P) / len(kinds)
        self.log_share_2N = torch.where(share_2N > 0, share_2N.log(), 0.0).float()

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        triggers, targets = [], []
        for i, (trigger_P, target_P) in enumerate(self.kinds):
            count = size // len(self.kinds) + (i < size % len(self.kinds))
            at = torch.randint(len(trigger_P), (count,), generator=generator)
            triggers.append(trigger_P[at])
            targets.append(target_P[at])
        order = torch.randperm(size, generator=generator)
        return torch.cat(triggers)[order], torch.cat(targets)[order]


@pytest.mark.parametrize("parts", [{"item2item": 3, "user2item": 2}, {"user2item": 1}])
def test_pairs_on_disk_are_drawn_as_pairs_in_memory(
    tmp_path: Path, parts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_rows, "_PAIRS_PER_BLOCK", 70)
    monkeypatch.setattr(pair_sampler, "_PAIRS_PER_BLOCK", 110)
    row_of = {item: row for row, item in enumerate(CONTENT.tolist())}
    kinds = []
    for pairs in mined(tmp_path, parts).values():
        known = [(row_of[a], row_of[b]) for a, b in pairs if a in row_of and b in row_of]
        assert 0 < len(known) < len(pairs)
        trigger_P, target_P = torch.tensor(known).T.contiguous()
        kinds.append((trigger_P, target_P))
    expected = InMemory(kinds, len(CONTENT), seed=5)

    (tmp_path / "rows").mkdir()
    write_pair_rows(tmp_path, CONTENT, tmp_path / "rows")
    found = read_pair_rows(tmp_path / "rows")
    sampler = PairSampler([*found.values()], len(CONTENT), seed=5)

    assert [*found] == [*parts]
    assert all(isinstance(pairs_P2, np.memmap) for pairs_P2 in found.values())
    assert torch.equal(sampler.log_share_2N, expected.log_share_2N)
    for number in range(4):
        for side, other in zip(
            sampler.batch(number, 201), expected.batch(number, 201), strict=True
        ):
            assert torch.equal(side, other)

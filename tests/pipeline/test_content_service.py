"""A rank's end of the content service, with actors that only count what they are asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multimodal.rank_group import RankGroup
from pipeline.content import transport as content_transport
from pipeline.content.transport import ActorCalls, StoreTransport


class CountingActor:
    """Answers at once: the vector of a row is its number, twice."""

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.encode_now = SimpleNamespace(remote=self._encode_now)

    def _encode_now(self, step: int, rows_U: np.ndarray, *, exact: bool) -> np.ndarray:
        self.requests.append(len(rows_U))
        return np.stack([rows_U, rows_U], axis=1).astype(np.float32)


class OneOf(RankGroup):
    """A rank whose gathering gives what it gave itself."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def gather(self, own: torch.Tensor, count: int) -> torch.Tensor:
        return own


@pytest.mark.parametrize("num_ranks", [1, 4, 3000])
def test_what_all_ranks_ask_an_actor_for_at_once_does_not_grow_with_their_number(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = 9000
    actors = [CountingActor(), CountingActor()]
    monkeypatch.setattr(content_transport.ray, "get", lambda answers, timeout: answers)
    ranks = OneOf(num_ranks - 1, num_ranks)
    calls = ActorCalls(actors, ranks.rank, timeout_s=1.0)
    transport = StoreTransport(calls, ranks, torch.device("cpu"), width=2)
    vectors_RH = transport.encode_all(5, num_rows, exact=True)

    rows = torch.arange(num_rows)[(num_ranks - 1) * -(-num_rows // num_ranks) :]
    assert torch.equal(vectors_RH, torch.stack([rows, rows], dim=1).float())
    largest = max(max(actor.requests) for actor in actors)
    assert largest * num_ranks <= max(1024, num_ranks)

"""What every member of a `TensorGroup` does, whatever its device."""

import time
from typing import Any

import torch

from pipeline.content.group import TensorGroup, meeting_place, of_ranks_and, wait

TIMEOUT_S = 60.0


def join(
    store: Any, member: int, size: int, device: torch.device, timeout_s: float = TIMEOUT_S
) -> TensorGroup:
    """A group called `test`."""
    return TensorGroup(store, "test", member=member, size=size, device=device, timeout_s=timeout_s)


def check_operations(group: TensorGroup, member: int, size: int, device: torch.device) -> None:
    """Vectors of member 0 to all, in parts of a tensor as well; gradients back; sums for all."""
    received = torch.full((6, 3), float(member), device=device)
    for rows in (slice(0, 0), slice(0, 4)):  # an empty part is no operation
        wait(group.broadcast(received[rows]), TIMEOUT_S)
    assert received[:4].cpu().eq(0).all()
    assert received[4:].cpu().eq(member).all()

    of_all = torch.randn(size, 50, 3, generator=torch.Generator().manual_seed(0))
    own, everywhere = (of_all[member].to(device, copy=True) for _ in range(2))
    works = [group.add_to_first(own), group.add_up(everywhere)]  # both before the first wait
    for work in works:
        wait(work, TIMEOUT_S)
    if member == 0:
        assert torch.allclose(own.cpu(), of_all.sum(0), atol=1e-5)
    assert torch.allclose(everywhere.cpu(), of_all.sum(0), atol=1e-5)


def sit_in_group(port: int) -> None:
    """A process that is actor 0 of one rank, and does nothing; it imports little, to start fast."""
    store = meeting_place("127.0.0.1", port, TIMEOUT_S)
    group = TensorGroup(
        store,
        of_ranks_and(0),
        member=0,
        size=2,
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
    )
    time.sleep(TIMEOUT_S)
    group.leave()

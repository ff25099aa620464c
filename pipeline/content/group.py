"""A process group of its own for tensors between training ranks and actors, device to device.

Ray's own direct transport ties a tensor to the process that made the group and its actors, so that
ranks which all call the same actors cannot share one; and the ranks' default group has no actors
in it. So members meet at a store of rank 0, and the group is known to nobody else: NCCL on GPUs,
gloo on CPUs.
"""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_POLL_S = 1e-4
"""Between two looks at an operation: NCCL has no wait of the host that ends in time."""
_LATER = 2
"""The group's own limit is so many times ours: what it says then does not tell who waited."""


OF_ACTORS = "actors"
"""Name of the group of all actors."""


def meeting_place(host: str, port: int, timeout_s: float, *, opens: bool = False) -> Any:
    """The store where members meet; the one who `opens` it takes a free port with port 0."""
    return dist.TCPStore(  # type: ignore[attr-defined] # public, but not in __all__
        host, port, is_master=opens, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


class TensorGroup:
    """Members that post the same operations in the same order, with tensors of the same shape.

    A post returns at once. Its tensor belongs to the group until the operation is done. What is
    added up is added in an order that the number of members determines, whoever came first.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        *,
        member: int,
        size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """Returns once all members are there.

        Args:
            store: where they meet (a `torch.distributed` store), this member's own connection.
            name: of the group; a store serves several.
            member: this one's number, 0 .. size - 1.
            size: how many there are.
            device: of the tensors; on GPUs every member needs one of its own.
            timeout_s: how long to wait for the others.

        Raises:
            TimeoutError, RuntimeError: they did not come.
        """
        own = dist.PrefixStore(name, store)  # type: ignore[attr-defined] # as above
        limit = timedelta(seconds=_LATER * timeout_s)
        self._backend: Any  # torch's stubs leave the operations of a backend out
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._backend = dist.ProcessGroupNCCL(own, member, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(own, member, size, limit)
        try:
            # NCCL connects members by the first operation of a kind, which blocks until all come.
            for post in (self.broadcast, self.add_to_first, self.add_up):
                wait(post(torch.zeros(1, device=device)), timeout_s)
        except BaseException:
            self.leave()
            raise

    def broadcast(self, tensor: Tensor) -> dist.Work | None:
        """Replace the tensor by that of member 0. None, as below: it is empty, nothing to do."""
        if not tensor.numel():
            return None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._backend.broadcast([tensor], options)

    def add_to_first(self, tensor: Tensor) -> dist.Work | None:
        """Replace the tensor by the sum over members on member 0, by anything on others."""
        if not tensor.numel():
            return None
        options = dist.ReduceOptions()
        options.rootRank = 0
        return self._backend.reduce([tensor], options)

    def add_up(self, tensor: Tensor) -> dist.Work | None:
        """Replace the tensor by the sum over members, the same bits on all."""
        if not tensor.numel():
            return None
        return self._backend.allreduce([tensor], dist.AllreduceOptions())

    def leave(self) -> None:
        """Close the connections without a word to the others.

        What is posted and lacks a member ends by the group's own limit, and dropping the group
        waits for that.
        """
        self._backend.abort()


def wait(work: dist.Work | None, timeout_s: float) -> None:
    """Until a posted operation is done.

    Raises:
        TimeoutError: a member has not posted its part in time.
        RuntimeError: a member has died.
    """
    if work is None:
        return
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all members have come within {timeout_s:g} s")
        time.sleep(_POLL_S)
    work.wait()


def of_ranks_and(actor: int) -> str:
    """Name of the group of an actor, its member 0, and the ranks."""
    return f"actor-{actor}"

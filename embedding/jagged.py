"""Jagged batches in the two orders that sequence models compute in; none is padded as a whole.

Buckets, for attention: samples sorted by length and cut where lengths differ much, so that padding
inside a bucket stays small. Time steps, for recurrence: step t of all samples that have one.

    events       sorted     buckets          time steps
    a1 a2        b1 b2 b3   b1 b2 b3         b1 a1 d1 | b2 a2 | b3
    b1 b2 b3     a1 a2      a1 a2 --
    (c: none)    d1         -------- cut
    d1                      d1
"""

# Shapes: B samples, N events of all samples, S longest sequence of a bucket, D width.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import fbgemm_gpu  # noqa: F401 # registers torch.ops.fbgemm
import torch
from torch import Tensor

Kernel = Literal["fbgemm", "torch"]

_SHORTEST_SHARE = 0.7
"""The shortest sequence of a bucket is at least this share of the longest."""


def segments_of(lengths_B: Tensor, num_events: int) -> Tensor:
    """The sample of every event, (N,). `num_events` saves waiting for the device."""
    samples_B = torch.arange(len(lengths_B), device=lengths_B.device)
    return torch.repeat_interleave(samples_B, lengths_B, output_size=num_events)


@dataclass(frozen=True)
class Bucket:
    """Consecutive samples of similar length."""

    num_samples: int
    num_events: int
    longest: int
    offsets: Tensor
    """(num_samples + 1,), from 0."""

    def pad(self, values_ND: Tensor, kernel: Kernel) -> Tensor:
        """(num_samples, S, D) from the bucket's events; zeros behind the shorter sequences."""
        if kernel == "fbgemm":
            return torch.ops.fbgemm.jagged_to_padded_dense(
                values_ND, [self.offsets], [self.longest], 0.0
            )
        places_ND = self._places().unsqueeze(1).expand_as(values_ND)
        padded = values_ND.new_zeros(self.num_samples * self.longest, values_ND.shape[1])
        return padded.scatter(0, places_ND, values_ND).view(self.num_samples, self.longest, -1)

    def unpad(self, padded_BSD: Tensor, kernel: Kernel) -> Tensor:
        """The inverse of `pad`: (N, D)."""
        if kernel == "fbgemm":
            values_ND, _ = torch.ops.fbgemm.dense_to_jagged(
                padded_BSD, [self.offsets], self.num_events
            )
            return values_ND
        places_N1 = self._places().unsqueeze(1)
        return padded_BSD.flatten(0, 1).gather(0, places_N1.expand(-1, padded_BSD.shape[2]))

    def _places(self) -> Tensor:
        """Index of every event in the flattened padded block."""
        samples_N = segments_of(self.offsets.diff(), self.num_events)
        positions_N = torch.arange(self.num_events, device=self.offsets.device)
        return samples_N * self.longest + positions_N - self.offsets[samples_N]


@dataclass(frozen=True)
class SortedSamples:
    """Samples by falling length, in buckets. Making it waits for the device once."""

    order_B: Tensor
    """Sample at every sorted place."""
    lengths_B: Tensor
    """Falling."""
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, lengths_B: Tensor) -> "SortedSamples":
        """Sort and cut; samples without events come last and are in no bucket."""
        sorted_B, order_B = lengths_B.sort(descending=True, stable=True)
        return cls(order_B, sorted_B, tuple(_cut(sorted_B)))

    def events(self, lengths_B: Tensor, num_events: int) -> Tensor:
        """Index of the event at every sorted place, (N,): sample after sample, each in order."""
        starts_B = lengths_B.cumsum(0) - lengths_B
        sorted_starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        places_N = segments_of(self.lengths_B, num_events)
        shift_B = starts_B[self.order_B] - sorted_starts_B
        return shift_B[places_N] + torch.arange(num_events, device=lengths_B.device)


@dataclass(frozen=True)
class TimeSteps:
    """Events by position, then by falling length: what torch calls packed."""

    events_N: Tensor
    """Index of the event at every packed place."""
    samples_N: Tensor
    """Its sample."""
    sizes: tuple[int, ...]
    """Samples that have step 0, 1, ...; falling."""
    last_B: Tensor
    """Packed place of every sample's last event; of samples without events: 0."""

    @classmethod
    def of(cls, lengths_B: Tensor, num_events: int) -> "TimeSteps":
        """Waits for the device once."""
        device = lengths_B.device
        order_B = lengths_B.argsort(descending=True, stable=True)
        ranks_B = torch.empty_like(order_B)
        ranks_B[order_B] = torch.arange(len(order_B), device=device)
        # samples with more than t events, for t = 0, 1, ...
        sizes = len(lengths_B) - torch.bincount(lengths_B).cumsum(0)[:-1]
        starts = sizes.cumsum(0) - sizes
        samples_N = segments_of(lengths_B, num_events)
        first_B = lengths_B.cumsum(0) - lengths_B
        positions_N = torch.arange(num_events, device=device) - first_B[samples_N]
        places_N = starts[positions_N] + ranks_B[samples_N]
        events_N = torch.empty_like(places_N)
        events_N[places_N] = torch.arange(num_events, device=device)
        last_B = torch.zeros_like(lengths_B)
        if num_events:
            ends_B = starts[(lengths_B - 1).clamp(min=0)] + ranks_B
            last_B = torch.where(lengths_B > 0, ends_B, last_B)
        return cls(events_N, samples_N[events_N], tuple(sizes.tolist()), last_B)


def _cut(sorted_B: Tensor) -> Sequence[Bucket]:
    lengths: list[int] = sorted_B.tolist()
    offsets = torch.nn.functional.pad(sorted_B.cumsum(0), (1, 0))
    buckets: list[Bucket] = []
    first = 0
    for place in range(1, len(lengths) + 1):
        ends = place == len(lengths) or lengths[place] < _SHORTEST_SHARE * lengths[first]
        if ends:
            if lengths[first]:
                buckets.append(
                    Bucket(
                        num_samples=place - first,
                        num_events=sum(lengths[first:place]),
                        longest=lengths[first],
                        offsets=offsets[first : place + 1] - offsets[first],
                    )
                )
            first = place
    return buckets

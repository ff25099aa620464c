"""Jagged orders against lists, and the two padding kernels against each other."""

import pytest
import torch

from embedding.jagged import Bucket, SortedSamples, TimeSteps, segments_of

LENGTHS = [3, 0, 7, 1, 1, 0, 12, 6, 2]


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], [4], [5, 5, 5], []])
def test_sorted_samples_hold_every_event_once_in_order(lengths: list[int]) -> None:
    lengths_B = torch.tensor(lengths, dtype=torch.int64)
    samples = SortedSamples.of(lengths_B)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable, like ours
    expected = [starts[i] + k for i in order for k in range(lengths[i])]
    assert samples.order_B.tolist() == order
    assert samples.events(lengths_B, sum(lengths)).tolist() == expected


def test_buckets_hold_similar_lengths_and_leave_nothing_out() -> None:
    lengths_B = torch.randint(0, 200, (300,), generator=torch.Generator().manual_seed(0))
    buckets = SortedSamples.of(lengths_B).buckets
    found = [length for bucket in buckets for length in bucket.offsets.diff().tolist()]
    assert found == sorted([n for n in lengths_B.tolist() if n], reverse=True)
    for bucket in buckets:
        lengths = bucket.offsets.diff()
        assert bucket.longest == int(lengths.max())
        assert int(lengths.min()) >= 0.7 * bucket.longest
        assert bucket.num_events == int(lengths.sum())
        assert bucket.num_samples == len(lengths)
    padded = sum(bucket.num_samples * bucket.longest for bucket in buckets)
    assert padded < 1.25 * int(lengths_B.sum()) < 300 * 199 / 1.5


@pytest.mark.parametrize("lengths", [LENGTHS, [4], [5, 5], [1, 1]])
def test_time_steps_are_those_of_packed_sequences(lengths: list[int]) -> None:
    steps = TimeSteps.of(torch.tensor(lengths), sum(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    expected = [(i, t) for t in range(max(lengths)) for i in order if lengths[i] > t]
    assert steps.samples_N.tolist() == [i for i, _ in expected]
    assert steps.events_N.tolist() == [starts[i] + t for i, t in expected]
    assert steps.sizes == tuple(sum(n > t for n in lengths) for t in range(max(lengths)))
    for i, length in enumerate(lengths):
        last = expected.index((i, length - 1)) if length else 0
        assert int(steps.last_B[i]) == last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fbgemm_and_torch_pad_alike_with_gradients(dtype: torch.dtype) -> None:
    lengths = [5, 4, 4]
    bucket = Bucket(3, 13, 5, torch.tensor([0, 5, 9, 13]))
    weights_BSD = torch.randn(3, 5, 6).to(dtype)
    weights_ND = torch.randn(13, 6).to(dtype)
    values = torch.randn(13, 6)
    results = []
    for kernel in ("fbgemm", "torch"):
        values_ND = values.to(dtype).requires_grad_()
        padded_BSD = bucket.pad(values_ND, kernel)
        back_ND = bucket.unpad(padded_BSD * weights_BSD, kernel)
        (back_ND * weights_ND).sum().backward()
        results.append((padded_BSD, back_ND, values_ND.grad))
    for fbgemm, plain in zip(*results, strict=True):
        assert fbgemm.equal(plain)
    padded_BSD, _, _ = results[1]
    start = 0
    for sample, length in enumerate(lengths):
        assert padded_BSD[sample, :length].equal(values[start : start + length].to(dtype))
        assert not padded_BSD[sample, length:].any()
        start += length


def test_segments_name_the_sample_of_every_event() -> None:
    assert segments_of(torch.tensor([2, 0, 1]), 3).tolist() == [0, 0, 2]

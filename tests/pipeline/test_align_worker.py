"""What an alignment does with a loss that is no number, and with a temperature that runs away."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.codes.config import AlignedVectors
from pipeline.codes.align_worker import keep_in_bounds, require_finite, write_vectors


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_training(broken: float) -> None:
    config = AlignedVectors(learning_rate=0.5, temperature=0.01)
    require_finite([3.0, 2.5], config)
    with pytest.raises(
        UserError,
        match=rf"loss is {broken} at step 3 \(the step before: 2.5\).*"
        r"learning_rate=0.5.*temperature=0.01",
    ):
        require_finite([3.0, 2.5, broken], config)
    with pytest.raises(UserError, match=rf"loss is {broken} at step 1, so"):
        require_finite([broken], config)


@pytest.mark.parametrize(("learned", "kept"), [(1e-4, 0.01), (0.05, 0.05), (40.0, 1.0)])
def test_a_learned_temperature_stays_in_its_bounds(learned: float, kept: float) -> None:
    log_temperature = torch.nn.Parameter(torch.tensor(learned).log())
    keep_in_bounds(log_temperature)
    assert float(log_temperature.detach().exp()) == pytest.approx(kept)


def test_a_temperature_to_learn_starts_within_its_bounds() -> None:
    assert AlignedVectors(temperature=2.0).temperature == 2.0
    with pytest.raises(ValueError, match="temperature=2.0 is learned between 0.01 and 1.0; start"):
        AlignedVectors(temperature=2.0, learn_temperature=True)


@pytest.mark.parametrize("num_rows", [0, 700])
def test_vectors_are_written_a_chunk_at_a_time(num_rows: int, tmp_path: Path) -> None:
    rows = torch.arange(num_rows).flip(0)
    made: list[weakref.ref[Tensor]] = []

    def vectors_of(rows_U: Tensor) -> Tensor:
        assert not any(ref() is not None for ref in made), "what is written is held no longer"
        vectors_UD = torch.stack([rows_U, -rows_U], dim=1).double()
        vectors_UD[rows_U % 100 == 3, 1] = float("nan")
        made.append(weakref.ref(vectors_UD))
        return vectors_UD

    assert write_vectors(tmp_path / "part.npy", vectors_of, rows, 2) == num_rows // 100

    found = np.load(tmp_path / "part.npy")
    assert (found.shape, found.dtype) == ((num_rows, 2), np.float32)
    assert found[:, 0].tolist() == rows.tolist()
    assert np.isnan(found[:, 1]).sum() == num_rows // 100
    assert len(made) == -(-num_rows // 256)

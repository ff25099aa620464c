"""What an alignment does with a loss that is no number, and with a temperature that runs away."""

import pytest
import torch

from embedding.errors import UserError
from multimodal.codes.config import AlignedVectors
from pipeline.codes.align_worker import keep_in_bounds, require_finite


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

"""What an alignment does with a loss that is no number."""

import pytest

from embedding.errors import UserError
from multimodal.codes.config import AlignedVectors
from pipeline.codes.align_worker import require_finite


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

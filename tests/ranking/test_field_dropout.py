"""Fields left out in training: which, how often, and never when the model is used."""

import pytest
import torch

from embedding.errors import UserError
from embedding.tables import EmbeddedBatch
from ranking.compatibility import check_model
from ranking.config import ModelConfig
from ranking.field_dropout import FieldDropout
from tests.ranking.small_run import SCHEMA

NUM_SAMPLES = 20_000


def embedded() -> EmbeddedBatch:
    return EmbeddedBatch(
        fields_BD=torch.rand(NUM_SAMPLES, 7).add(1).requires_grad_(),
        field_names=("user_id", "item_id", "city"),
        field_dims=(2, 4, 1),
        sequences={},
        lengths={},
    )


def test_a_field_is_zero_in_its_share_of_the_samples_and_whole_in_the_others() -> None:
    torch.manual_seed(0)
    before = embedded()

    after = FieldDropout({"item_id": 0.3, "city": 0.6})(before)

    lost = {name: after.field(name) == 0 for name in after.field_names}
    assert not lost["user_id"].any()
    for name, share in (("item_id", 0.3), ("city", 0.6)):
        assert torch.equal(lost[name].all(dim=1), lost[name].any(dim=1))
        # Four standard deviations of a share of 20,000 samples.
        assert lost[name][:, 0].float().mean().item() == pytest.approx(share, abs=0.014)
        assert torch.equal(after.field(name)[~lost[name]], before.field(name)[~lost[name]])
    both = (lost["item_id"][:, 0] & lost["city"][:, 0]).float().mean().item()
    assert both == pytest.approx(0.18, abs=0.011)  # drawn independently of one another


def test_lost_fields_pass_no_gradient() -> None:
    before = embedded()

    after = FieldDropout({"item_id": 0.5})(before)
    after.fields_BD.sum().backward()

    gradient = before.fields_BD.grad
    assert gradient is not None
    assert torch.equal(gradient, (after.fields_BD != 0).float())


def test_nothing_is_lost_when_the_model_is_used() -> None:
    before = embedded()

    assert FieldDropout({"item_id": 0.9}).eval()(before) is before


def test_an_unknown_field_is_refused() -> None:
    model = ModelConfig(field_dropout={"item": 0.1})

    with pytest.raises(
        UserError, match=r"'item' is not among the .*'item_id'\]; did you mean 'item_id'"
    ):
        check_model(SCHEMA, model)

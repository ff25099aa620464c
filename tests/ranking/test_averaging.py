"""What is published of an averaged model, and that averaging leaves no trace in the weights."""

import torch

from ranking.averaging import published_weights
from ranking.model import RankingModel, RankingStep
from tests.ranking.harness import CPU
from tests.ranking.small_run import SCHEMA, small_config


def _step() -> RankingStep:
    config = small_config(ema_decay=0.9)
    step = RankingStep(RankingModel(SCHEMA, config, tables_device=CPU), config)
    with torch.no_grad():
        for buffer in step.average.buffers():
            buffer.normal_()
    return step


def test_weights_come_back_after_the_average_was_in_use() -> None:
    step = _step()
    before = {name: p.detach().clone() for name, p in step.named_parameters()}
    with step.averaged():
        for parameter, average in zip(
            step.model.ranker.parameters(), step.average.buffers(), strict=True
        ):
            assert parameter.equal(average)
    assert all(p.equal(before[name]) for name, p in step.named_parameters())


def test_published_weights_are_the_averages_under_the_parameters_names() -> None:
    step = _step()
    state = {name: t for name, t in step.state_dict().items() if "tables" not in name.split(".")}
    published = published_weights(state)
    assert not [name for name in published if name.startswith("average")]
    step.install_average()
    installed = step.state_dict()
    assert set(published) == {name for name in state if not name.startswith("average.")}
    assert all(tensor.equal(installed[name]) for name, tensor in published.items())


def test_without_an_average_the_weights_are_published() -> None:
    config = small_config()
    step = RankingStep(RankingModel(SCHEMA, config, tables_device=CPU), config)
    state = step.state_dict()
    assert published_weights(state) == state

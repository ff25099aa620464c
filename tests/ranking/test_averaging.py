"""What is published of an averaged model, and that averaging leaves no trace in the weights."""

from pathlib import Path

import torch

from embedding.loader import SampleFiles, SampleLoader
from ranking.averaging import published_weights
from ranking.fgcnn_config import Fgcnn
from ranking.model import RankingModel, RankingStep
from tests.ranking.harness import CPU
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples


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


def _with_batch_norm(ema_decay: float | None) -> RankingStep:
    config = small_config(ema_decay=ema_decay)
    generator = Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,), batch_norm=True)
    model = config.model.model_copy(update={"generator": generator})
    config = config.model_copy(update={"model": model})
    step = RankingStep(RankingModel(SCHEMA, config, tables_device=CPU), config)
    step.model.tables.initialize(seed=0)
    return step


def test_running_moments_are_averaged_with_the_weights_decay(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    files = SampleFiles([tmp_path / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    with SampleLoader(files, batch_size_per_rank=16).sequential() as stream:
        batches = list(stream)[:12]
    step = _with_batch_norm(ema_decay=0.5)
    norm = step.model.ranker.fields.generator.blocks[0].norm
    expected = {"running_mean": norm.running_mean.clone(), "running_var": norm.running_var.clone()}
    for index, batch in enumerate(batches):
        step(batch)
        step.update_average(index)
        decay = min(0.5, index / (index + 9))
        for name, average in expected.items():
            for channel in range(len(average)):
                raw = getattr(norm, name)[channel].item()
                average[channel] = decay * average[channel] + (1 - decay) * raw

    raw = {name: getattr(norm, name).clone() for name in expected}
    with step.averaged():
        for name, average in expected.items():
            torch.testing.assert_close(getattr(norm, name), average)
            assert not getattr(norm, name).equal(raw[name])
    assert all(getattr(norm, name).equal(before) for name, before in raw.items())
    state = {name: t for name, t in step.state_dict().items() if "tables" not in name.split(".")}
    published = published_weights(state)
    (served,) = [t for name, t in published.items() if name.endswith("norm.running_mean")]
    torch.testing.assert_close(served, expected["running_mean"])
    assert set(published) == {name for name in state if not name.startswith("average.")}


def test_without_an_average_the_weights_are_published() -> None:
    config = small_config()
    step = RankingStep(RankingModel(SCHEMA, config, tables_device=CPU), config)
    state = step.state_dict()
    assert published_weights(state) == state

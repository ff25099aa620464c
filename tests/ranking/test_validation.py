"""Validation in the loop: what it measures, what it decides, and that a resume changes nothing."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from embedding.errors import UserError
from embedding.loader import SampleFiles, SampleLoader
from ranking.metrics import TaskValues
from ranking.prediction import predict
from ranking.trainer_config import (
    CosineDecay,
    Plateau,
    ScheduleConfig,
    TrainerConfig,
    ValidationConfig,
)
from ranking.validation import ValidationState, deciding_value, validate
from tests.ranking.harness import CPU, Harness, weights_of, without_clocks
from tests.ranking.small_run import NUM_ROWS, SCHEMA, TASKS, small_config, write_samples

STEPS_PER_EPOCH = math.ceil(NUM_ROWS / 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[SampleFiles, SampleFiles]:
    """Rows to train on, and rows held out; their labels are noise."""
    folder = tmp_path_factory.mktemp("samples")
    files = []
    for seed, name in enumerate(("train", "held_out")):
        write_samples(folder / f"{name}.parquet", seed)
        tasks = [task.name for task in TASKS]
        files.append(SampleFiles([folder / f"{name}.parquet"], SCHEMA, tasks))
    return files[0], files[1]


def _harness(data: tuple[SampleFiles, SampleFiles], **trainer: Any) -> Harness:
    return Harness(data[0], small_config(**trainer), held_out=data[1])


def _state(values: list[float], **trainer: Any) -> ValidationState:
    """After validations with these values at steps 10, 20, ..."""
    config, state = TrainerConfig(**trainer), ValidationState()
    for index, value in enumerate(values, start=1):
        state = state.after(10 * index, value, config)
    return state


def test_metrics_are_those_of_the_held_out_rows(data: tuple[SampleFiles, SampleFiles]) -> None:
    harness = _harness(data, epochs=1)
    harness.fit()
    with SampleLoader(data[1], batch_size_per_rank=16).sequential() as stream:
        parts = list(predict(harness.step, stream, CPU))
    probs, labels, weights = (
        torch.cat([getattr(part, name) for part in parts]).numpy()
        for name in ("probs_RT", "labels_RT", "weights_RT")
    )
    metrics = harness.validations[STEPS_PER_EPOCH]
    for index, task in enumerate(TASKS):
        seen = weights[:, index] > 0
        truth, scores = labels[seen, index], probs[seen, index]
        assert metrics[f"validation/{task.name}/weight"] == seen.sum()
        bound = metrics[f"validation/{task.name}/auc_error_bound"] + 1e-9
        auc = metrics[f"validation/{task.name}/auc"]
        assert auc == pytest.approx(roc_auc_score(truth, scores), abs=bound)
        logloss = metrics[f"validation/{task.name}/logloss"]
        assert logloss == pytest.approx(log_loss(truth, scores), rel=1e-9)


def test_validation_does_not_change_training(data: tuple[SampleFiles, SampleFiles]) -> None:
    plain, validated = Harness(data[0], small_config()), _harness(data)
    plain.fit()
    validated.fit()
    assert weights_of(plain).equal(weights_of(validated))


@pytest.mark.parametrize(
    ("every", "steps"), [(None, [19, 38]), (10, [10, 20, 30, 38]), (19, [19, 38])]
)
def test_validations_come_at_their_steps_and_at_the_end(
    data: tuple[SampleFiles, SampleFiles], every: int | None, steps: list[int]
) -> None:
    harness = _harness(data, validation=ValidationConfig(every_steps=every))
    harness.fit()
    assert list(harness.validations) == steps


def test_the_best_checkpoint_is_saved_when_it_is_found_and_named(
    data: tuple[SampleFiles, SampleFiles],
) -> None:
    harness = _harness(
        data,
        epochs=4,
        checkpoint_every_steps=None,
        validation=ValidationConfig(every_steps=6, metric="logloss"),
    )
    summary = harness.fit()
    mean = {
        step: sum(metrics[f"validation/{task.name}/logloss"] for task in TASKS) / 2
        for step, metrics in harness.validations.items()
    }
    best = min(mean, key=mean.__getitem__)
    assert best < summary.steps  # noise is only learnt by heart
    assert summary.validation.best_step == best
    assert summary.validation.best_value == mean[best]
    running = [step for step in mean if mean[step] == min(v for s, v in mean.items() if s <= step)]
    assert set(harness.checkpoints) == {*running, summary.steps}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_warm_start_is_the_result_unless_training_makes_it_better(
    data: tuple[SampleFiles, SampleFiles], ema_decay: float | None
) -> None:
    settings = {"ema_decay": ema_decay, "validation": ValidationConfig(metric="logloss")}
    parent = _harness(data, epochs=4, **settings)
    parent.fit()
    child = _harness(data, epochs=3, **settings)
    child.step.load_state_dict(parent.step.state_dict())
    summary = child.fit(is_warm_start=True)

    own = [f"validation/{task.name}/logloss" for task in TASKS]
    published = parent.validations[4 * STEPS_PER_EPOCH]
    assert {key: child.validations[0][key] for key in own} == {key: published[key] for key in own}
    assert summary.validation.best_step == 0  # noise is only learnt by heart
    assert 0 in child.checkpoints
    resumed = _harness(data, epochs=3, **settings)
    again = resumed.fit(resumed.restore(child.checkpoints[0]), is_warm_start=True)
    assert again.validation == summary.validation
    assert 0 not in resumed.validations


def test_training_stops_when_its_patience_ends(data: tuple[SampleFiles, SampleFiles]) -> None:
    settings = {"epochs": 9, "checkpoint_every_steps": None}
    validation = {"every_steps": 6, "metric": "logloss"}
    stopped = _harness(data, **settings, validation=ValidationConfig(**validation, patience=2))
    summary = stopped.fit()
    assert summary.stopped_early
    assert summary.steps == summary.validation.best_step + 2 * 6
    assert summary.totals.rows == stopped.source.rows_before(summary.position)
    full = _harness(data, **settings, validation=ValidationConfig(**validation))
    assert not full.fit().stopped_early
    for step, metrics in stopped.validations.items():
        assert full.validations[step] == metrics
    again = _harness(data, **settings, validation=ValidationConfig(**validation, patience=2))
    resumed = again.fit(again.restore(stopped.checkpoints[summary.steps]))
    assert (resumed.steps, resumed.totals.rows) == (summary.steps, summary.totals.rows)
    assert resumed.stopped_early


EVERYTHING = {
    "ema_decay": 0.9,
    "max_grad_norm": 1.0,
    "schedule": ScheduleConfig(
        warmup_steps=5, decay=CosineDecay(final_factor=0.1), plateau=Plateau(factor=0.5)
    ),
    "validation": ValidationConfig(every_steps=6, metric="logloss", patience=5),
    "epochs": 4,
}


@pytest.mark.parametrize("step", [7, 14, 21, 35])
def test_a_resume_with_everything_on_equals_the_undisturbed_run(
    data: tuple[SampleFiles, SampleFiles], step: int
) -> None:
    whole, resumed = (
        Harness(data[0], small_config(**EVERYTHING), held_out=data[1], embedding_l2=0.01)
        for _ in range(2)
    )
    expected = whole.fit()
    assert len({m["train/rate_factor"] for m in whole.reports.values()}) > 5
    assert expected.validation.rate_factor < 1  # a plateau was met
    found = resumed.fit(resumed.restore(whole.checkpoints[step]))
    assert weights_of(resumed).equal(weights_of(whole))
    for name, buffer in whole.step.named_buffers():
        assert resumed.step.get_buffer(name).equal(buffer), name
    assert (found.steps, found.validation) == (expected.steps, expected.validation)
    assert resumed.validations == {s: m for s, m in whole.validations.items() if s > step}
    reports = {s: m for s, m in without_clocks(whole.reports).items() if s > step}
    assert without_clocks(resumed.reports) == reports


def test_the_average_is_validated_and_the_weights_train_on(
    data: tuple[SampleFiles, SampleFiles],
) -> None:
    plain, averaged = _harness(data, epochs=1), _harness(data, epochs=1, ema_decay=0.9)
    history = []
    ranker = averaged.model.ranker
    averaged.optimizer.register_step_post_hook(
        lambda *_: history.append([p.detach().clone() for p in ranker.parameters()])
    )
    plain.fit()
    averaged.fit()
    assert weights_of(plain).equal(weights_of(averaged))
    assert plain.validations != averaged.validations
    expected = history[0]
    for step, weights in enumerate(history[1:], start=1):
        decay = min(0.9, step / (step + 9))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    for ours, theirs in zip(averaged.step.average.buffers(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 sums
    # What was validated is what is published: the averaged weights.
    averaged.step.install_average()
    source = SampleLoader(data[1], batch_size_per_rank=16)
    published = validate(averaged.step, source, CPU, len(TASKS))
    metrics = averaged.validations[STEPS_PER_EPOCH]
    assert metrics["validation/click/logloss"] == published[0].logloss


def test_an_improvement_must_exceed_the_minimum() -> None:
    config = ValidationConfig(min_improvement=0.01)
    state = _state([0.70, 0.705, 0.708], validation=config)
    assert (state.best_step, state.since_best) == (10, 2)
    state = _state([0.70, 0.705, 0.72], validation=config)
    assert (state.best_step, state.best_value, state.since_best) == (30, 0.72, 0)


def test_logloss_improves_downwards() -> None:
    state = _state([0.5, 0.4, 0.6], validation=ValidationConfig(metric="logloss"))
    assert (state.best_step, state.best_value) == (20, 0.4)


def test_a_plateau_cuts_the_rate_once_every_patience() -> None:
    schedule = ScheduleConfig(plateau=Plateau(factor=0.5, patience=2))
    factors = [
        _state([0.7, 0.6, 0.6, 0.6, 0.6, 0.8, 0.7][:n], schedule=schedule).rate_factor
        for n in range(1, 8)
    ]
    assert factors == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_metric_that_is_not_defined_is_refused_with_the_remedy() -> None:
    nothing = TaskValues(0.0, None, None, None, None, None, None)
    one = TaskValues(10.0, 0.5, 0.6, 0.9, 1.0, 0.7, 0.0)
    with pytest.raises(UserError, match=r"auc of task 'like' is not defined.*validation_days"):
        deciding_value(ValidationConfig(), TASKS, [one, nothing])
    assert deciding_value(ValidationConfig(task="click"), TASKS, [one, nothing]) == 0.7
    assert deciding_value(ValidationConfig(), TASKS, [one, one]) == 0.7
    diverged = TaskValues(10.0, 0.5, math.nan, None, 1.0, 0.5, 0.0)
    with pytest.raises(UserError, match="diverged; lower"):
        deciding_value(ValidationConfig(metric="logloss"), TASKS, [one, diverged])

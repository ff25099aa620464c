"""The training loop on a small unsharded model: determinism, resume, bookkeeping, refusals."""

import logging
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from embedding.loader import SampleFiles
from ranking.classifier_config import DeepFm
from ranking.evaluation import evaluate_predictions
from ranking.prediction import predict
from ranking.progress import Progress
from ranking.steps import dense_parameters
from tests.ranking.harness import CPU, Harness, weights_of, without_clocks
from tests.ranking.small_run import NUM_ROWS, SCHEMA, TASKS, small_config, write_samples


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SampleFiles:
    path = tmp_path_factory.mktemp("samples") / "part.parquet"
    write_samples(path)
    return SampleFiles([path], SCHEMA, [task.name for task in TASKS])


STEPS = 2 * math.ceil(NUM_ROWS / 16)


def test_same_seed_same_run(files: SampleFiles) -> None:
    first, second = Harness(files, small_config()), Harness(files, small_config())
    first.fit()
    second.fit()
    assert weights_of(first).equal(weights_of(second))
    assert without_clocks(first.reports) == without_clocks(second.reports)


def test_another_seed_another_model(files: SampleFiles) -> None:
    first, second = Harness(files, small_config()), Harness(files, small_config(seed=1))
    assert not weights_of(first).equal(weights_of(second))


@pytest.mark.parametrize("step", [7, 14, 21, 28, 35])
def test_a_resumed_run_equals_the_undisturbed_one_to_the_last_digit(
    files: SampleFiles, step: int
) -> None:
    whole = Harness(files, small_config())
    whole.fit()
    resumed = Harness(files, small_config())
    resumed.fit(resumed.restore(whole.checkpoints[step]))
    assert weights_of(resumed).equal(weights_of(whole))
    expected = {s: m for s, m in without_clocks(whole.reports).items() if s > step}
    assert without_clocks(resumed.reports) == expected
    assert set(resumed.checkpoints) == {s for s in whole.checkpoints if s > step}


@pytest.mark.parametrize("step", [7, 35, STEPS])
def test_rows_and_time_of_a_resumed_run_are_those_of_all_its_steps(
    files: SampleFiles, step: int
) -> None:
    whole = Harness(files, small_config())
    whole.fit()
    checkpoint = whole.checkpoints[step]
    resumed = Harness(files, small_config())

    totals = resumed.fit(resumed.restore(checkpoint)).totals

    before = checkpoint["progress"]["totals"]
    assert 0 < before["rows"] <= totals.rows == 2 * NUM_ROWS
    assert 0 < before["seconds"] < totals.seconds
    assert totals.data_s >= before["data_s"]
    assert totals.rows_per_s == totals.rows / totals.seconds


def test_a_checkpoint_without_totals_is_gone_on_with(files: SampleFiles) -> None:
    whole = Harness(files, small_config())
    whole.fit()
    checkpoint = whole.checkpoints[35]
    before = checkpoint["progress"].pop("totals")
    resumed = Harness(files, small_config())

    assert resumed.fit(resumed.restore(checkpoint)).totals.rows == 2 * NUM_ROWS - before["rows"]


def test_reports_and_checkpoints_come_at_their_steps(files: SampleFiles) -> None:
    harness = Harness(files, small_config())
    summary = harness.fit()
    assert set(harness.reports) == {*range(4, STEPS + 1, 4), STEPS}
    assert set(harness.checkpoints) == {*range(7, STEPS + 1, 7), STEPS}
    assert summary.steps == STEPS
    assert summary.totals.rows == 2 * NUM_ROWS  # filling rows are not counted


def test_rows_are_told_as_they_were_trained_whatever_the_batch(files: SampleFiles) -> None:
    harness = Harness(files, small_config())
    harness.fit()
    rows = {reached.step: reached.rows for reached in harness.reached}
    assert rows[4] == 4 * 16
    assert rows[20] == NUM_ROWS + 16  # step 19 ends the epoch with 300 - 18 * 16 = 12 rows
    assert rows[STEPS] == 2 * NUM_ROWS
    assert {reached.num_rows for reached in harness.reached} == {2 * NUM_ROWS}

    resumed = Harness(files, small_config(batch_size_per_rank=32))
    resumed.fit(resumed.restore(harness.checkpoints[7]))
    assert (resumed.reached[0].step, resumed.reached[0].rows) == (8, 7 * 16 + 32)
    assert resumed.reached[-1].rows == resumed.reached[-1].num_rows == 2 * NUM_ROWS


def test_without_an_interval_there_is_one_checkpoint_at_the_end(files: SampleFiles) -> None:
    harness = Harness(files, small_config(checkpoint_every_steps=None))
    harness.fit()
    assert set(harness.checkpoints) == {STEPS}


def test_windows_count_every_observed_label_once(files: SampleFiles) -> None:
    harness = Harness(files, small_config(epochs=1))
    harness.fit()
    observed = {"click": NUM_ROWS, "like": 0.0}
    with harness.source.sequential() as stream:
        for batch in stream:
            likes = batch.labels_BT[: batch.num_rows, 1]
            observed["like"] += float(likes.isnan().logical_not().sum())
    for task, weight in observed.items():
        seen = [metrics[f"train/{task}/weight"] for metrics in harness.reports.values()]
        assert sum(seen) == weight


def test_reported_loss_is_the_mean_of_the_losses_optimised(files: SampleFiles) -> None:
    harness = Harness(files, small_config(epochs=1, log_every_steps=1))
    losses = []
    harness.step.register_forward_hook(lambda *args: losses.append(args[-1][0].item()))
    harness.fit()
    reported = [metrics["train/loss"] for metrics in harness.reports.values()]
    assert reported == pytest.approx(losses, rel=1e-5)  # the model's sum is float32


def test_penalties_are_reported_beside_the_loss_and_are_none_of_an_evaluation(
    files: SampleFiles,
) -> None:
    harness = Harness(files, small_config(epochs=1), embedding_l2=0.5)
    losses: list[float] = []
    hook = harness.step.register_forward_hook(lambda *args: losses.append(args[-1][0].item()))
    harness.fit()
    hook.remove()
    windows = pairwise([0, *harness.reports])
    for (first, last), metrics in zip(windows, harness.reports.values(), strict=True):
        mean = sum(losses[first:last]) / (last - first)
        assert metrics["train/penalty"] > 0.001
        assert metrics["train/loss"] + metrics["train/penalty"] == pytest.approx(mean, rel=1e-5)

    harness.step.eval()
    with harness.source.sequential() as stream:
        loss, (logits_BT, labels_BT, weights_BT, penalty) = harness.step(next(iter(stream)))
    assert float(penalty) == 0
    assert float(loss) == float(harness.step.loss(logits_BT, labels_BT, weights_BT))


def test_training_equals_a_plain_loop(files: SampleFiles) -> None:
    config = small_config(epochs=1)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"classifier": DeepFm(hidden=(16,))})}
    )
    harness, plain = Harness(files, config), Harness(files, config)
    harness.fit()
    with plain.source.shuffled(Progress().position) as stream:
        for batch in stream:
            plain.optimizer.zero_grad()
            plain.step(batch)[0].backward()
            plain.optimizer.step()
    assert weights_of(harness).equal(weights_of(plain))


def test_clipping_bounds_the_dense_gradient_norm(files: SampleFiles) -> None:
    harness = Harness(files, small_config(epochs=1, max_grad_norm=1e-3))
    norms = []

    def record(*_: Any) -> None:
        grads = [p.grad for p in dense_parameters(harness.step)]
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None)))

    harness.optimizer.register_step_pre_hook(record)
    harness.fit()
    assert len(norms) == STEPS // 2
    assert max(norms) <= 1e-3 * (1 + 1e-4)


def test_a_diverged_run_stops_and_says_what_to_change(files: SampleFiles) -> None:
    harness = Harness(files, small_config())
    with torch.no_grad():
        next(harness.model.ranker.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=r"task 'click' became nan before step 4.*learning_rate"):
        harness.fit()
    assert harness.checkpoints == {}


def test_autocast_keeps_tables_and_logits_in_fp32(files: SampleFiles) -> None:
    exact, rounded = (Harness(files, small_config(precision=p)) for p in ("fp32", "bf16"))
    with exact.source.sequential() as stream:
        batch = next(stream)
    logits = [harness.model.eval()(batch) for harness in (exact, rounded)]
    assert logits[1].dtype == torch.float32
    assert not logits[0].equal(logits[1])
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.02)  # bf16 keeps 8 bits
    rounded.step(batch)[0].backward()
    assert {p.grad.dtype for p in rounded.step.parameters() if p.grad is not None} == {
        torch.float32
    }


def test_probabilities_near_one_keep_their_logloss(files: SampleFiles) -> None:
    """exp(-20) from 1 is 1 in float32, and a row that is not positive would cost 27.6, not 20."""
    harness = Harness(files, small_config())
    output = harness.model.ranker.heads.towers.output
    with torch.no_grad():
        output.weight_EDH.zero_()
        output.bias_E1H.fill_(20.0)
    with harness.source.sequential() as stream:
        parts = list(predict(harness.step, stream, CPU))
    probs, labels = (
        torch.cat([getattr(part, name)[:, 0] for part in parts]).numpy()
        for name in ("probs_RT", "labels_RT")
    )
    found = evaluate_predictions(labels=labels, probs=probs, groups=np.zeros(len(labels)))
    assert found.logloss == pytest.approx(20.0 * (labels == 0).mean(), rel=1e-6)


def test_the_step_line_has_everything(files: SampleFiles, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Harness(files, small_config()).fit()
    line = caplog.messages[0]
    number = r"[\d.]+"
    assert line.startswith(f"step 4/{STEPS} | loss ")
    parts = line.split(" | ")
    patterns = [
        rf"loss {number}",
        rf"click ne {number} auc {number}",
        rf"like ne {number} auc {number}",
        rf"{number}k? rows/s",
        r"data \d+%",
        rf"rss {number} GiB",
        r"eta \d+s",
    ]
    assert len(parts) == 1 + len(patterns)
    for part, pattern in zip(parts[1:], patterns, strict=True):
        assert re.fullmatch(pattern, part), part


def test_predictions_cover_every_row_once_with_the_model_s_probabilities(
    files: SampleFiles,
) -> None:
    harness = Harness(files, small_config())
    with harness.source.sequential() as stream:
        parts = list(predict(harness.step, stream, CPU))
    keys = torch.cat([part.keys_RK for part in parts])
    assert keys[:, 0].tolist() == list(range(NUM_ROWS))
    with harness.source.sequential() as stream:
        batch = next(stream)
    expected = torch.sigmoid(harness.model(batch).double())
    torch.testing.assert_close(parts[0].probs_RT, expected)
    assert parts[-1].probs_RT.shape == (NUM_ROWS % 16, 2)

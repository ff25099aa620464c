"""The penalty on looked-up vectors against its formula on the table's rows."""

from pathlib import Path

import pytest
import torch

from embedding.loader import SampleFiles, SampleLoader
from ranking.fgcnn_config import Fgcnn
from ranking.model import RankingModel, RankingStep
from tests.ranking.harness import CPU
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

L2 = 0.3


@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("size", [16, 64])  # 300 rows: the last batch of 64 is filled up
def test_the_penalty_is_half_l2_times_the_squares_of_every_look_up(
    tmp_path: Path, size: int, with_generator: bool
) -> None:
    """A field reads whole rows, an event only the classifier's half of one."""
    write_samples(tmp_path / "part.parquet")
    files = SampleFiles([tmp_path / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    with SampleLoader(files, batch_size_per_rank=size).sequential() as stream:
        batch = list(stream)[-1]
    assert batch.num_rows == 300 % size
    config = small_config()
    if with_generator:
        generator = Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,))
        widened = config.model.model_copy(update={"generator": generator})
        config = config.model_copy(update={"model": widened})
    model = RankingModel(SCHEMA, config, tables_device=CPU).eval()
    model.tables.initialize(seed=0)
    user, item = (w for _, w in sorted(model.tables.named_parameters(), key=_table))
    losses, gradients = [], []
    for l2 in (0.0, L2):
        loss, _ = RankingStep(model, config, embedding_l2=l2)(batch)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, [user, item]))

    squares, expected = 0.0, [torch.zeros_like(user), torch.zeros_like(item)]
    for features in (batch.pooled, batch.unpooled):
        for name, jagged in features.to_dict().items():
            table = 0 if name == "user_id" else 1
            weight = (user, item)[table].detach().clone()
            if name == "past_item":
                weight[:, 16:] = 0
            offsets = jagged.offsets().tolist()
            for row in jagged.values()[: offsets[batch.num_rows]].tolist():
                squares += float(weight[row].square().sum())
                expected[table][row] += L2 * weight[row] / size
    assert losses[1] - losses[0] == pytest.approx(L2 / 2 * squares / size, rel=1e-3)
    for table in (0, 1):
        # Differences of float32 gradients of order 1e-2.
        torch.testing.assert_close(
            gradients[1][table] - gradients[0][table], expected[table], rtol=1e-3, atol=1e-7
        )


def _table(named: tuple[str, torch.Tensor]) -> bool:
    return named[0].split(".")[-2] != "user"

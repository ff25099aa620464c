"""TorchRec's pipelined loop, which traces the model, gives what a plain loop gives."""

import pytest
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embedding.batch import RankingBatch
from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.feature_schema import FeatureSchema
from tests.distributed import run_distributed
from tests.embedding.toy import CPU, ToyModel, loss_of, toy_batch, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration


class ToyLoss(ToyModel):
    """What the pipeline wants: (loss, outputs)."""

    def forward(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        logits = super().forward(batch)
        return loss_of(logits, batch), logits


def test_pipelined_training_equals_a_plain_loop() -> None:
    run_distributed(_check, 2)


def _check() -> None:
    _compare(toy_schema("row_wise"))
    _compare(toy_schema("column_wise"))


def _compare(schema: FeatureSchema) -> None:
    hosts = ShardingConfig(ranks_per_host=2)
    plain = toy_sharded(schema, RowWiseAdagrad(), hosts)
    expected = train(plain, range(4))
    piped = toy_sharded(schema, RowWiseAdagrad(), hosts, model=ToyLoss)
    pipeline = TrainPipelineSparseDist(piped.model, piped.optimizer, CPU, execute_all_batches=True)
    listed = [toy_batch(schema, 1000 * step + dist.get_rank()) for step in range(4)]
    batches = iter(listed)
    losses = [float(loss_of(pipeline.progress(batches), batch)) for batch in listed]
    assert losses == expected
    assert len(pipeline._pipelined_modules) == 2, "the bag and the sequence collection"

"""The ranking model: tables -> interests -> classifier -> one logit a task. Knows no ranks."""

# Shapes: B samples, T tasks, F dense features, D embedding dim, N events of all histories, X width.

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from embedding.batch import RankingBatch
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.items import ContentVectors
from embedding.tables import EmbeddedBatch, EmbeddingTables
from ranking.averaging import DenseAverage
from ranking.classifier_config import READ_ANY_DIMS
from ranking.classifiers.build import build_classifier
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.compatibility import check_model, table_widths
from ranking.config import ModelConfig, RankingConfig
from ranking.content import (
    ContentInterest,
    ContentPart,
    ContentPort,
    ContentShape,
    ContentSource,
)
from ranking.experts import build_heads
from ranking.field_dropout import FieldDropout
from ranking.fields import FieldGenerator
from ranking.history import HistoryInterest
from ranking.losses import TaskLoss
from ranking.mlp import in_float32
from ranking.regularization import LookupPenalty
from ranking.tasks import EntireSpaceLabels, TaskChain

StepOutput = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]
"""(loss, (logits_BT, labels_BT, weights_BT, penalty)): what TorchRec's train pipelines expect.

The penalty is the part of the loss that is not that of the tasks; 0 but in training.
"""


class RankingModel(nn.Module):
    """Multi-task click model: sharded tables and a dense ranker."""

    def __init__(
        self,
        schema: FeatureSchema,
        config: RankingConfig,
        *,
        tables_device: torch.device,
        content: ContentShape | None = None,
    ) -> None:
        """Build the tables on `tables_device` (`meta` before sharding) and the ranker on the CPU.

        With `content`, the ranker reads content vectors of items, too.

        Raises:
            UserError: the model does not fit the schema.
        """
        super().__init__()
        check_model(schema, config.model, 0 if content is None else content.num_fields)
        self.schema = schema
        self.tables = EmbeddingTables(table_widths(schema, config.model), tables_device)
        self.chain = TaskChain(config.tasks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            self.ranker = Ranker(
                schema,
                config.model,
                num_tasks=len(config.tasks),
                autocast=config.trainer.precision == "bf16",
                content=content,
            )

    def forward(self, batch: RankingBatch, content: ContentVectors | None = None) -> Tensor:
        """Logits of the tasks' probabilities over all rows (`ranking.tasks`); (B, T), float32."""
        return self.rank(self.tables(batch), batch, content)

    def rank(
        self, embedded: EmbeddedBatch, batch: RankingBatch, content: ContentVectors | None = None
    ) -> Tensor:
        """The same from what the tables gave."""
        return self.chain(self.ranker(embedded, batch.dense_BF, content))


class RankingStep(nn.Module):
    """The model with its loss: the module that is sharded and trained."""

    def __init__(
        self,
        model: RankingModel,
        config: RankingConfig,
        *,
        embedding_l2: float = 0.0,
        content: ContentPart | None = None,
    ) -> None:
        """`content` is there exactly if the model was built to read it."""
        super().__init__()
        self.model = model
        self.labels = EntireSpaceLabels(config.tasks)
        self.loss = TaskLoss([task.weight for task in config.tasks])
        self.penalty = LookupPenalty(model.schema, embedding_l2) if embedding_l2 else None
        decay = config.trainer.ema_decay
        self.average = None if decay is None else DenseAverage(model.ranker, decay)
        self.content = None if content is None else ContentPort(content.source)
        self.content_penalty = None if content is None else content.penalty

    @property
    def tables(self) -> EmbeddingTables:
        """The part that `embedding.shard` shards."""
        return self.model.tables

    def forward(self, batch: RankingBatch) -> StepOutput:
        """The loss, and what metrics need."""
        embedded = self.model.tables(batch)
        content = None if self.content is None else self.content(batch)
        logits_BT = self.model.rank(embedded, batch, content)
        labels_BT, weights_BT = self.labels(batch.labels_BT, batch.weights_BT)
        loss = self.loss(logits_BT, labels_BT, weights_BT)
        penalty = loss.new_zeros(())
        if self.training and self.penalty is not None:
            penalty = penalty + self.penalty(embedded, batch)
        if self.training and self.content_penalty is not None:
            penalty = penalty + self.content_penalty(content, embedded)
        outputs = (logits_BT.detach(), labels_BT, weights_BT, penalty.detach())
        return loss + penalty, outputs

    @property
    def content_source(self) -> ContentSource | None:
        """Who makes the content vectors, if the model reads any."""
        return None if self.content is None else self.content.source

    def start_average(self) -> None:
        """Let the average of the weights be the weights."""
        self.update_average(0)

    def update_average(self, step: int) -> None:
        """Add the weights after step `step` = 0, 1, ... to their average."""
        if self.average is not None:
            self.average.update(self.model.ranker, step)

    def averaged(self) -> AbstractContextManager[None]:
        """In the block, the model computes as it is published: with averaged dense weights."""
        return nullcontext() if self.average is None else self.average.in_use(self.model.ranker)

    def install_average(self) -> None:
        """Make the average, where there is one, the weights."""
        if self.average is not None:
            self.average.install(self.model.ranker)


class Ranker(nn.Module):
    """The dense side. Holds no table, so TorchRec's pipelines do not trace into it."""

    def __init__(
        self,
        schema: FeatureSchema,
        config: ModelConfig,
        *,
        num_tasks: int,
        autocast: bool,
        content: ContentShape | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        interests = [HistoryInterest(schema, interest) for interest in config.interests]
        self.interests = nn.ModuleList(interests)
        self.dropout = FieldDropout(config.field_dropout)
        self.fields = FieldGenerator(schema, config, 0 if content is None else content.num_fields)
        fields, width = self.fields.output_fields, sum(i.output_dim for i in interests)
        self.content: ContentInterest | None = None
        if content is not None:
            # Where fields are multiplied with one another, content must be among them.
            multiplied = not isinstance(config.classifier, READ_ANY_DIMS)
            self.content = ContentInterest(content, fields[0][1] if multiplied else None)
            fields, width = fields + self.content.output_fields, width + self.content.output_dim
        dims = InputDims(fields=fields, num_dense=len(schema.dense), interest=width)
        self.classifier = build_classifier(config.classifier, dims)
        self.heads = build_heads(config.experts, self.classifier.output_dim, num_tasks)

        self.combine = self._combine
        if config.compile:
            _check_compiler()
            # Histories are jagged, and every new length would be compiled again: they stay eager.
            self.combine = torch.compile(self._combine)

    def forward(
        self, embedded: EmbeddedBatch, dense_BF: Tensor, content: ContentVectors | None = None
    ) -> Tensor:
        """Logits of p(task | its parent); (B, T), float32."""
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.autocast):
            own, generator_BFD = self.fields.split(self.dropout(embedded))
            interests = [interest(own) for interest in self.interests]
            more_BX = dense_BF[:, :0]
            if self.content is not None:
                assert content is not None
                content_BX, more_BX = self.content(content)
                interests.append(content_BX)
            interests_BX = torch.cat(interests, dim=1) if interests else dense_BF[:, :0]
            logits_BT = self.combine(own.fields_BD, generator_BFD, dense_BF, interests_BX, more_BX)
        return logits_BT.float()

    def _combine(
        self,
        fields_BX: Tensor,
        generator_BFD: Tensor | None,
        dense_BX: Tensor,
        interests_BX: Tensor,
        more_BX: Tensor,
    ) -> Tensor:
        """Logits (B, T): everything behind lookup and interests. `more_BX` are further fields."""
        # Cast once, before anything is copied: concatenation would widen bf16 to float32 again.
        dtype = torch.bfloat16 if self.autocast else torch.float32
        if generator_BFD is not None:
            generator_BFD = generator_BFD.to(dtype)
        fields_BX = self.fields(fields_BX.to(dtype), generator_BFD)
        if more_BX.shape[1]:
            fields_BX = torch.cat([fields_BX, more_BX.to(dtype)], dim=1)
        inputs = ClassifierInputs(
            fields_BX=fields_BX,
            dense_BX=dense_BX.to(dtype),
            interests_BX=interests_BX.to(dtype),
        )
        representation_BX = self.classifier(inputs)
        if isinstance(self.heads, nn.Linear):
            return in_float32(self.heads, representation_BX)
        logits_BT: Tensor = self.heads(representation_BX)
        return logits_BT


def _check_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError(
            "ranking.model.compile=true needs a C++ compiler on every worker, and there is neither "
            "g++ nor clang++ on PATH; install one, name it in CXX, or set ranking.model.compile to "
            "false"
        )

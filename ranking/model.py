"""The ranking model: tables -> interests -> classifier -> one logit a task. Knows no ranks."""

# Shapes: B samples, T tasks, F dense features, D embedding dim, N events of all histories, X width.

import os
import shutil

import torch
from torch import Tensor, nn

from embedding.batch import RankingBatch
from embedding.config import FeatureSchema
from embedding.errors import UserError
from embedding.tables import EmbeddedBatch, EmbeddingTables
from ranking.classifiers.build import build_classifier
from ranking.classifiers.inputs import ClassifierInputs, InputDims
from ranking.compatibility import check_model, table_widths
from ranking.config import InterestConfig, ModelConfig, RankingConfig
from ranking.experts import MixtureOfExperts
from ranking.fields import FieldGenerator
from ranking.interest import TargetAttention
from ranking.losses import TaskLoss

StepOutput = tuple[Tensor, tuple[Tensor, Tensor, Tensor]]
"""(loss, (logits_BT, labels_BT, weights_BT)): what TorchRec's train pipelines expect."""


class RankingModel(nn.Module):
    """Multi-task click model: sharded tables and a dense ranker."""

    def __init__(
        self, schema: FeatureSchema, config: RankingConfig, *, tables_device: torch.device
    ) -> None:
        """Build the tables on `tables_device` (`meta` before sharding) and the ranker on the CPU.

        Raises:
            UserError: the model does not fit the schema.
        """
        super().__init__()
        check_model(schema, config.model)
        self.tables = EmbeddingTables(table_widths(schema, config.model), tables_device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            self.ranker = Ranker(
                schema,
                config.model,
                num_tasks=len(config.tasks),
                autocast=config.trainer.precision == "bf16",
            )

    def forward(self, batch: RankingBatch) -> Tensor:
        """Logits (B, T), float32."""
        return self.ranker(self.tables(batch), batch.dense_BF)


class RankingStep(nn.Module):
    """The model with its loss: the module that is sharded and trained."""

    def __init__(self, model: RankingModel, config: RankingConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = TaskLoss([task.weight for task in config.tasks])

    @property
    def tables(self) -> EmbeddingTables:
        """The part that `embedding.shard` shards."""
        return self.model.tables

    def forward(self, batch: RankingBatch) -> StepOutput:
        """The loss, and what metrics need."""
        logits_BT = self.model(batch)
        loss = self.loss(logits_BT, batch.labels_BT, batch.weights_BT)
        return loss, (logits_BT.detach(), batch.labels_BT, batch.weights_BT)


class Ranker(nn.Module):
    """The dense side. Holds no table, so TorchRec's pipelines do not trace into it."""

    def __init__(
        self, schema: FeatureSchema, config: ModelConfig, *, num_tasks: int, autocast: bool
    ) -> None:
        super().__init__()
        self.autocast = autocast
        interests = [HistoryInterest(schema, interest) for interest in config.interests]
        self.interests = nn.ModuleList(interests)
        self.fields = FieldGenerator(schema, config)
        dims = InputDims(
            fields=self.fields.output_fields,
            num_dense=len(schema.dense),
            interest=sum(interest.output_dim for interest in interests),
        )
        self.classifier = build_classifier(config.classifier, dims)
        self.heads = (
            nn.Linear(self.classifier.output_dim, num_tasks)
            if config.experts is None
            else MixtureOfExperts(config.experts, self.classifier.output_dim, num_tasks)
        )

        self.combine = self._combine
        if config.compile:
            _check_compiler()
            # Histories are jagged, and every new length would be compiled again: they stay eager.
            self.combine = torch.compile(self._combine)

    def forward(self, embedded: EmbeddedBatch, dense_BF: Tensor) -> Tensor:
        """Logits (B, T), float32."""
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.autocast):
            own, generator_BFD = self.fields.split(embedded)
            interests = [interest(own) for interest in self.interests]
            interests_BX = torch.cat(interests, dim=1) if interests else dense_BF[:, :0]
            logits_BT = self.combine(own.fields_BD, generator_BFD, dense_BF, interests_BX)
        return logits_BT.float()

    def _combine(
        self,
        fields_BX: Tensor,
        generator_BFD: Tensor | None,
        dense_BX: Tensor,
        interests_BX: Tensor,
    ) -> Tensor:
        """Logits (B, T): everything behind lookup and interests."""
        # Cast once, before anything is copied: concatenation would widen bf16 to float32 again.
        dtype = torch.bfloat16 if self.autocast else torch.float32
        if generator_BFD is not None:
            generator_BFD = generator_BFD.to(dtype)
        inputs = ClassifierInputs(
            fields_BX=self.fields(fields_BX.to(dtype), generator_BFD),
            dense_BX=dense_BX.to(dtype),
            interests_BX=interests_BX.to(dtype),
        )
        logits_BT: Tensor = self.heads(self.classifier(inputs))
        return logits_BT


def _check_compiler() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError(
            "ranking.model.compile=true needs a C++ compiler on every worker, and there is neither "
            "g++ nor clang++ on PATH; install one, name it in CXX, or set ranking.model.compile to "
            "false"
        )


class HistoryInterest(nn.Module):
    """Target attention over one history: all its sequences against the candidate's features."""

    def __init__(self, schema: FeatureSchema, config: InterestConfig) -> None:
        super().__init__()
        sequences = [s for s in schema.sequences if s.history == config.history]
        compared = [s for s in sequences if s.target is not None]
        if not compared:
            raise UserError(
                f"ranking.model.interests: no sequence of history {config.history!r} names a "
                "target, so there is nothing to compare the candidate with; give one of "
                f"{[s.name for s in sequences]} a target"
            )
        self.history = config.history
        self.targets = [s.target for s in compared if s.target is not None]
        self.compared = [s.name for s in compared]
        self.side = [s.name for s in sequences if s.target is None]
        dims = {s.name: schema.table(s.table).embedding_dim for s in sequences}
        self.attention = TargetAttention(
            sum(dims[name] for name in self.compared),
            sum(dims[name] for name in self.side),
            config.hidden,
            softmax=config.softmax,
        )

    @property
    def output_dim(self) -> int:
        """Width of the interest vector."""
        return self.attention.output_dim

    def forward(self, embedded: EmbeddedBatch) -> Tensor:
        """The interest vectors, (B, output_dim)."""
        query_BD = torch.cat([embedded.field(name) for name in self.targets], dim=1)
        keys_ND = torch.cat([embedded.sequences[name] for name in self.compared], dim=1)
        side = [embedded.sequences[name] for name in self.side]
        side_NS = torch.cat(side, dim=1) if side else keys_ND[:, :0]
        return self.attention(query_BD, keys_ND, side_NS, embedded.lengths[self.history])

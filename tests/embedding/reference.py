"""The toy model in plain PyTorch, which sharded training is compared with."""

import torch
from torch import Tensor, nn

from embedding.config import Adagrad, Adam, RowWiseAdagrad, Sgd
from embedding.feature_schema import FeatureSchema
from embedding.initialization import initialize_shard
from embedding.planning.plan_description import PlanDescription
from tests.embedding.toy import loss_of, toy_batch


class Reference:
    """The toy model in plain PyTorch on the global batch, one process, its own optimizer.

    The loss is the mean over ranks of each rank's loss. Row-wise Adagrad keeps one accumulator per
    row of every column block, as column shards do.
    """

    def __init__(self, schema: FeatureSchema, optimizer, plan: PlanDescription):
        self.schema, self.optimizer = schema, optimizer
        self.spans = {
            table.table: sorted(
                {(s.column_offset, s.column_offset + s.num_columns) for s in table.shards}
            )
            for table in plan.tables
        }
        self.weights = {}
        for table in schema.tables:
            weight = torch.empty(table.num_embeddings, table.embedding_dim)
            initialize_shard(weight, table, seed=7)
            self.weights[table.name] = weight.requires_grad_()
        self.states = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.means = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.num_steps = 0
        self.linear = nn.Linear(56 + 8, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 64).view(1, 64))
            self.linear.bias.zero_()
        self.adam = torch.optim.Adam(self.linear.parameters(), lr=0.01)

    def logits(self, seed: int) -> Tensor:
        batch = toy_batch(self.schema, seed)
        inputs = {**batch.pooled.to_dict(), **batch.unpooled.to_dict()}

        def pool(feature: str, table: str, mode: str = "sum") -> Tensor:
            offsets = inputs[feature].offsets()[:-1].long()
            return nn.functional.embedding_bag(
                inputs[feature].values(), self.weights[table], offsets, mode=mode
            )

        fields = [
            pool("genres", "genre", "mean"),
            pool("item_id", "item"),
            pool("user_id", "user"),
            pool("friend", "user"),
            pool("city", "city"),
            pool("click_items", "item"),
        ]
        return self.linear(torch.cat(fields, dim=1))

    def step(self, seeds: list[int]) -> None:
        self.adam.zero_grad()
        loss = sum(loss_of(self.logits(s), toy_batch(self.schema, s)) for s in seeds) / len(seeds)
        loss.backward()
        self.adam.step()
        self.num_steps += 1
        for name, weight in self.weights.items():
            lr = self.schema.table(name).learning_rate or self.optimizer.learning_rate
            with torch.no_grad():
                weight -= lr * self._direction(name, weight.grad)
            weight.grad = None

    def _direction(self, name: str, grad: Tensor) -> Tensor:
        match self.optimizer:
            case Sgd():
                return grad
            case Adagrad(eps=eps):
                self.states[name] += grad.square()
                return grad / (self.states[name].sqrt() + eps)
            case RowWiseAdagrad(eps=eps):
                for start, stop in self.spans[name]:
                    block = grad[:, start:stop].square().mean(dim=1, keepdim=True)
                    self.states[name][:, start:stop] += block
                return grad / (self.states[name].sqrt() + eps)
            case Adam(beta1=beta1, beta2=beta2, eps=eps):
                # Rows that the batch does not show stay as they are: moments and all.
                shown = grad.any(dim=1, keepdim=True)
                mean = torch.lerp(grad, self.means[name], beta1)
                square = torch.lerp(grad.square(), self.states[name], beta2)
                self.means[name] = torch.where(shown, mean, self.means[name])
                self.states[name] = torch.where(shown, square, self.states[name])
                unbiased = mean / (1 - beta1**self.num_steps)
                root = (square / (1 - beta2**self.num_steps)).sqrt()
                return torch.where(shown, unbiased / (root + eps), 0.0)
        raise AssertionError(self.optimizer)

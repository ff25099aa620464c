"""The interest a model reads from one history: its sequences, the candidate, and a block."""

# Shapes: B samples, N events of all histories, D width.

import torch
from torch import Tensor, nn

from embedding.feature_schema import FeatureSchema
from embedding.tables import EmbeddedBatch
from ranking.compatibility import check_interest, num_gap_rows
from ranking.dien import InterestEvolution
from ranking.hstu import SequenceTransduction
from ranking.interest import TargetAttention
from ranking.interest_config import Dien, Din, Hstu, InterestConfig


class HistoryInterest(nn.Module):
    """All sequences of one history against the candidate's features."""

    def __init__(self, schema: FeatureSchema, config: InterestConfig) -> None:
        super().__init__()
        check_interest(schema, config)
        sequences = [s for s in schema.sequences if s.history == config.history]
        compared = [s for s in sequences if s.target is not None]
        self.history = config.history
        self.targets = [s.target for s in compared if s.target is not None]
        self.compared = [s.name for s in compared]
        self.side = [s.name for s in sequences if s.target is None]
        self.gap = config.gap if isinstance(config, Hstu) else None
        dims = {s.name: schema.table(s.table).embedding_dim for s in sequences}
        query_dim = sum(dims[name] for name in self.compared)
        side_dim = sum(dims[name] for name in self.side)
        self.block: TargetAttention | InterestEvolution | SequenceTransduction
        match config:
            case Din():
                self.block = TargetAttention(
                    query_dim, side_dim, config.hidden, softmax=config.softmax
                )
            case Dien():
                self.block = InterestEvolution(query_dim, side_dim, config.hidden_dim)
            case Hstu():
                history = next(h for h in schema.histories if h.name == config.history)
                self.block = SequenceTransduction(
                    query_dim,
                    side_dim,
                    config,
                    max_length=history.max_length,
                    num_gaps=num_gap_rows(schema, config),
                )

    @property
    def output_dim(self) -> int:
        """Width of the interest vector."""
        return self.block.output_dim

    def forward(self, embedded: EmbeddedBatch) -> Tensor:
        """The interest vectors, (B, output_dim)."""
        query_BD = torch.cat([embedded.field(name) for name in self.targets], dim=1)
        keys_ND = torch.cat([embedded.sequences[name] for name in self.compared], dim=1)
        side = [embedded.sequences[name] for name in self.side]
        side_NS = torch.cat(side, dim=1) if side else keys_ND[:, :0]
        inputs = (query_BD, keys_ND, side_NS, embedded.lengths[self.history])
        if self.gap is None:
            return self.block(*inputs)
        return self.block(*inputs, embedded.gap_rows[self.gap])

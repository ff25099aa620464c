"""Table sets and plans to measure: drawn at random for calibration, or all sensible ones."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedding.config import TableConfig
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.limits import ELEMENT_BYTES
from embedding.planning.choices import DATA_PARALLEL, TABLE_WISE, Choice
from embedding.planning.cost import CostModel, Placed
from embedding.planning.layout import Layout
from embedding.planning.proposers import Options
from embedding.planning.search import CanonicalForm, all_placed, canonical

MAX_REPLICATED_BYTES = 16 << 20
"""Data-parallel tables beyond this are never sensible: their dense gradient costs too much."""


@dataclass(frozen=True)
class SampledTables:
    """A table set to measure."""

    schema: FeatureSchema
    batch_size_per_rank: int
    exponent: float


def sample_tables(
    seed: int, *, max_tables: int = 8, max_rows: int = 600_000, min_tables: int = 2
) -> SampledTables:
    """Tables of mixed sizes, dims and pooling, one feature each."""
    rng = np.random.default_rng(seed)
    num_tables = int(rng.integers(min_tables, max_tables + 1))
    batch_size = int(rng.choice([256, 512, 1024, 2048]))
    exponent = float(rng.choice([0.0, 0.8, 1.0, 1.2]))
    tables, features = [], []
    for index in range(num_tables):
        rows = int(10 ** rng.uniform(2.3, np.log10(max_rows)))
        dim = int(rng.choice([8, 16, 32, 64, 128]))
        pooling = int(rng.choice([1, 1, 1, 3, 10, 30]))
        tables.append(TableConfig(name=f"t{index}", num_embeddings=rows, embedding_dim=dim))
        features.append(SparseFeature(name=f"f{index}", table=f"t{index}", max_length=pooling))
    schema = FeatureSchema(tables=tuple(tables), sparse=tuple(features))
    return SampledTables(schema, batch_size, exponent)


def sample_placements(
    model: CostModel, options: Options, count: int, seed: int
) -> list[dict[str, Placed]]:
    """Placements of a few sharding types each, half of them unbalanced on purpose."""
    rng = np.random.default_rng(seed)
    types = sorted({choice.sharding for choices in options.values() for choice in choices})
    placements = []
    for number in range(count):
        drawn = [sharding for sharding in types if rng.random() < 0.5]
        used = drawn or [types[int(rng.integers(len(types)))]]
        layout = Layout(model)
        for table, choices in options.items():
            choice = _drawn_choice(model, table, choices, used, rng)
            targets = layout.best_targets(table, choice)
            if number % 2 and choice.domain == "rank" and not choice.one_host:
                ranks = rng.permutation(model.shape.world_size)
                targets = tuple(int(ranks[u % len(ranks)]) for u in range(choice.num_units))
            assert targets is not None, "sampled tables are small"
            layout.add(table, Placed(choice, targets))
        placements.append(layout.placement)
    return placements


def _drawn_choice(
    model: CostModel,
    table: str,
    choices: Sequence[Choice],
    used: list[str],
    rng: np.random.Generator,
) -> Choice:
    allowed = [c for c in choices if c.sharding in used and is_sensible(model, table, c)]
    allowed = allowed or [c for c in choices if c.sharding == TABLE_WISE] or list(choices)
    return allowed[int(rng.integers(len(allowed)))]


def is_sensible(model: CostModel, table: str, choice: Choice) -> bool:
    """Whether anyone would run a table like this."""
    load = model.loads[table]
    size = load.num_rows * load.dim * ELEMENT_BYTES
    return choice.sharding != DATA_PARALLEL or size <= MAX_REPLICATED_BYTES


def all_sensible(model: CostModel, options: Options) -> Iterator[dict[str, Placed]]:
    """Every placement of sensible choices, once up to renaming hosts, and ranks within a host."""
    tables = list(options)
    ways = [
        [
            placed
            for choice in options[table]
            if is_sensible(model, table, choice)
            for placed in all_placed(choice, model)
        ]
        for table in tables
    ]
    seen: set[CanonicalForm] = set()
    for combination in itertools.product(*ways):
        form = canonical(combination, model.shape.ranks_per_host)
        if form not in seen:
            seen.add(form)
            yield dict(zip(tables, combination, strict=True))

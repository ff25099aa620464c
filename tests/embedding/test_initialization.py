import torch

from embedding.config import TableConfig
from embedding.initialization import initialize_shard

TABLE = TableConfig(name="item", num_embeddings=70_000, embedding_dim=8, init_bound=0.25)


def whole(seed: int = 1, table: TableConfig = TABLE) -> torch.Tensor:
    weight = torch.empty(table.num_embeddings, table.embedding_dim)
    initialize_shard(weight, table, seed=seed)
    return weight


def test_any_rectangle_equals_the_same_part_of_the_whole_table() -> None:
    piece = torch.empty(40_000, 4)
    initialize_shard(piece, TABLE, seed=1, row_offset=20_000, column_offset=4)
    assert torch.equal(piece, whole()[20_000:60_000, 4:])


def test_values_are_uniform_within_the_bound() -> None:
    weight = whole()
    assert weight.min() >= -0.25
    assert weight.max() < 0.25
    # 560,000 draws: standard error of the mean 0.25 / sqrt(3) / sqrt(n), of the second moment less
    standard_error = 0.25 / 3**0.5 / weight.numel() ** 0.5
    assert weight.mean().abs() < 5 * standard_error
    assert (weight.var() - 0.25**2 / 3).abs() < 5 * 0.25**2 * weight.numel() ** -0.5
    quarters = torch.histc(weight, 4, -0.25, 0.25) / weight.numel()
    assert (quarters - 0.25).abs().max() < 0.005


def test_seed_and_name_decide() -> None:
    assert torch.equal(whole(), whole())
    assert not torch.equal(whole(1), whole(2))
    other = TABLE.model_copy(update={"name": "user"})
    assert not torch.equal(whole(), whole(table=other))


def test_default_bound_is_one_over_root_of_rows() -> None:
    table = TableConfig(name="t", num_embeddings=10_000, embedding_dim=4)
    assert 0.0099 < whole(table=table).abs().max() <= 0.01

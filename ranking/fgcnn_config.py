"""Configuration of FGCNN, and how many features it generates.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from embedding.config import StrictConfig
from ranking.classifier_config import check_same_length


class Fgcnn(StrictConfig):
    """Feature generation by CNN: new features beside the raw ones, for any classifier.

    The lists hold one entry a block; the defaults are the paper's setting for 24 fields.
    """

    kind: Literal["fgcnn"] = "fgcnn"
    maps: tuple[PositiveInt, ...] = (14, 16, 18, 20)
    """Channels of every convolution."""
    heights: tuple[PositiveInt, ...] = (7, 7, 7, 7)
    """Fields a kernel covers."""
    pools: tuple[PositiveInt, ...] = (2, 2, 2, 2)
    """Fields that max-pooling folds into one."""
    new_maps: tuple[PositiveInt, ...] = (3, 3, 3, 3)
    """New features for every field that is left after the block's pooling."""
    pool_rounding: Literal["ceil", "floor"] = "ceil"
    """Whether the fields left over by a pool form one of their own."""
    batch_norm: bool = False
    """Normalise the maps before tanh."""
    embeddings: Literal["separate", "shared"] = "separate"
    """`separate`: tables hold columns of their own for the generator, found by the same lookup."""
    raw_features: bool = True
    """False: the classifier sees the new features only."""
    blocks: Literal["cnn", "mlp"] = "cnn"
    """`mlp`: dense layers of the same widths in place of convolution and pooling, for which
    `heights` mean nothing."""
    recombination: bool = True
    """False: the pooled maps are the new features; `maps` like `new_maps` keep their number."""
    shuffle_seed: NonNegativeInt | None = None
    """The generator reads the fields in an order drawn from this seed; None: the schema's."""

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        check_same_length(self, ("maps", "heights", "pools", "new_maps"))
        if self.batch_norm and self.blocks == "mlp":
            raise ValueError(
                "batch_norm stands between convolution and tanh, and blocks=mlp has no "
                "convolution; set batch_norm to false, or blocks to cnn"
            )
        return self

    def pooled_heights(self, num_fields: int) -> tuple[int, ...]:
        """Fields left after the pooling of every block.

        Raises:
            ValueError: a block has none left.
        """
        heights, height = [], num_fields
        for block, pool in enumerate(self.pools):
            pooled = -(-height // pool) if self.pool_rounding == "ceil" else height // pool
            if pooled == 0:
                raise ValueError(
                    f"pools.{block}: a pool of {pool} empties the {height} fields that block "
                    f"{block} reads ({num_fields} fields at the start, pool_rounding=floor); use "
                    f"a pool of at most {height}, fewer blocks, or pool_rounding=ceil"
                )
            heights.append(pooled)
            height = pooled
        return tuple(heights)

    def num_new_features(self, num_fields: int) -> tuple[int, ...]:
        """New features of every block."""
        per_height = self.new_maps if self.recombination else self.maps
        heights = self.pooled_heights(num_fields)
        return tuple(h * n for h, n in zip(heights, per_height, strict=True))

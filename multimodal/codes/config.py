"""Configuration of semantic codes (QARM): quantizers, item vectors, refits.

Imports pydantic and nothing heavy, so that a recipe is checked without torch or faiss.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embedding.config import StrictConfig
from multimodal.codes.pair_config import Swing, User2Item
from multimodal.content_config import ContentConfig

MAX_FSQ_CODES = 1 << 20
LEARNED_TEMPERATURES = (0.01, 1.0)
"""Bounds of a temperature that is trained: beyond them only the hardest negative, or all alike."""
CODES_FORMAT = 3
"""Of codes artifacts; those of another format are made again."""


class ExactIndex(StrictConfig):
    """Compares a vector with all items; cost grows with the square of the catalogue."""

    kind: Literal["exact"] = "exact"


class IvfIndex(StrictConfig):
    """Inverted lists: compares with the items of the nearest lists only."""

    kind: Literal["ivf"] = "ivf"
    num_lists: PositiveInt | None = None
    """Default: four times the square root of the number of items."""
    num_probes: PositiveInt = 32
    """Lists searched per vector; more finds more of the true neighbours and takes longer."""


class HnswIndex(StrictConfig):
    """A navigable graph: fast look-ups, more memory and a slow build."""

    kind: Literal["hnsw"] = "hnsw"
    num_links: PositiveInt = 32
    """Neighbours of each item in the graph: more find more, and take more memory."""
    ef_construction: PositiveInt = 80
    """Candidates looked at for each link while the graph is built."""
    ef_search: PositiveInt = 128
    """Candidates looked at in a search: more find more of the true neighbours."""


class IndexBySize(StrictConfig):
    """Exact up to a limit, inverted lists (of which `num_probes` are searched) beyond."""

    kind: Literal["by_size"] = "by_size"
    exact_up_to_items: PositiveInt = 100_000
    """Items up to which all are compared with all."""
    num_probes: PositiveInt = 32


VqIndex = Annotated[ExactIndex | IvfIndex | HnswIndex | IndexBySize, Field(discriminator="kind")]


class Vq(StrictConfig):
    """The code of an item is the list of its `top_k` nearest other items, by cosine."""

    top_k: PositiveInt = 25
    """Neighbours in a code (25 in the paper)."""
    index: VqIndex = IndexBySize()
    max_items: PositiveInt = 10_000
    """Items that the set can hold: the rows of the code table. Slots of items that are gone are
    used again at a refit."""


class Fsq(StrictConfig):
    """Finite scalar quantization of what K-means left, as one code."""

    num_directions: PositiveInt = 13
    """Principal directions of the residual; at most the dimension of the vectors."""
    values_per_direction: Annotated[int, Field(ge=2)] = 2

    @property
    def num_codes(self) -> int:
        """Codes of the level."""
        return self.values_per_direction**self.num_directions

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if self.num_codes > MAX_FSQ_CODES:
            raise ValueError(
                f"fsq: {self.values_per_direction} values in {self.num_directions} directions are "
                f"{self.num_codes} codes, more than {MAX_FSQ_CODES}; use fewer directions or values"
            )
        return self


class Streaming(StrictConfig):
    """Mini-batch updates over all vectors, after the fit on a sample: for sets beyond memory."""

    num_passes: PositiveInt = 1
    """Over all items, for each level."""
    batch_size: PositiveInt = 65_536


class Rq(StrictConfig):
    """Residual K-means: one codeword index a level.

    Res-KmeansFSQ is `num_levels: 2` with `fsq`.
    """

    num_levels: PositiveInt = 3
    """K-means levels."""
    codebook_size: Annotated[int, Field(ge=2)] = 1024
    """Codewords a level."""
    fsq: Fsq | None = None
    iterations: PositiveInt = 10
    """Lloyd iterations of a first fit, at every resolution (1/16, 1/8, ... of the principal
    directions)."""
    refinement_rounds: NonNegativeInt = 10
    """Rounds that re-estimate all levels together after the level-wise fit."""
    refit_rounds: PositiveInt = 3
    """Such rounds of a fit that starts from earlier codebooks; more follow the data closer and
    change more codes."""
    points_per_codeword: PositiveInt = 256
    """Vectors per codeword in the training sample; a smaller set is used as a whole."""
    streaming: Streaming | None = None
    seed: NonNegativeInt = 0

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codes of every level. A code table needs one row more: row 0 is the OOV row."""
        last = (self.fsq.num_codes,) if self.fsq else ()
        return (*(self.codebook_size,) * self.num_levels, *last)

    def for_items(self, num_items: int) -> Self:
        """This config, if a set of that size can be quantized with it.

        Raises:
            ValueError: there are fewer items than codewords.
        """
        if num_items < self.codebook_size:
            raise ValueError(
                f"rq.codebook_size={self.codebook_size} needs at least as many items, and there "
                f"are {num_items}; set it to {suggested_codebook_size(num_items)} or less"
            )
        return self


class Suffix(StrictConfig):
    """A last code that tells items with equal codes apart, so that a full code names one item."""

    num_codes: PositiveInt = 256
    """Items that one code can tell apart; those beyond share the last number and are counted."""


class RefitPolicy(StrictConfig):
    """When codebooks are fitted anew."""

    every_days: PositiveInt | None = 28
    """Age of the codebooks in days; None: only on drift."""
    max_error_ratio: Annotated[float, Field(gt=1.0)] = 1.25
    """Quantization error of new items over that of held-out items of the fit."""
    min_utilisation_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    """Codewords that new items use over those that as many items of the fit would use, on the level
    where it is lowest."""
    min_new_items: PositiveInt = 100
    """Fewer new items say nothing about error and use."""
    keep_meaning: bool = True
    """Start from the codebooks before and keep code numbers and rows where meanings are alike.
    False renumbers all codes at every refit: only to show what that costs."""
    force_on: tuple[date, ...] = ()
    """Dates of runs that fit anew whatever the rest of the policy says."""


# --- item vectors --------------------------------------------------------------------------------


class ColumnVectors(StrictConfig):
    """Vectors of a model of yours, delivered with the catalogue."""

    kind: Literal["column"] = "column"
    column: str = "vector"
    """List of floats in items.parquet, of one length; null: the item gets no codes."""
    encoder: str = "1"
    """Name of the model that made them. Change it when the model changes: all vectors move then,
    and codebooks of the earlier ones are restated through the items of both."""


class TowerVectors(StrictConfig):
    """Mean tokens of frozen towers, standardised by dimension: content as it is, not aligned."""

    kind: Literal["towers"] = "towers"
    content: ContentConfig | None = None
    """Towers; default: those of the recipe's `content`."""


class AlignedVectors(StrictConfig):
    """Vectors of the content encoder, trained on pairs of items that the same users engage with."""

    kind: Literal["aligned"] = "aligned"
    content: ContentConfig | None = None
    """The encoder; default: the recipe's `content`. Its weights are its own: the ranker's content
    encoder is another copy."""
    history: str | None = None
    """Positives are the events that enter this history; default: the first one of the recipe."""
    swing: Swing = Swing()
    user2item: User2Item | None = User2Item()
    """None: Item2Item pairs only."""
    num_steps: PositiveInt = 300
    """Steps of the first alignment."""
    warm_steps: PositiveInt = 100
    """Steps of an alignment that goes on from an earlier one."""
    batch_size: Annotated[int, Field(ge=2)] = 1024
    """Pairs of a step, over all ranks; equally many on each, so a rest is left out."""
    items_per_chunk: PositiveInt | None = 256
    """Items whose activations a rank holds at a time. With dropout, which is drawn for so many
    items at once, another number is another alignment; without, the result does not depend on it.
    """
    temperature: PositiveFloat = 0.07
    """Cosines are divided by it: lower ones look at the hardest negatives only."""
    learn_temperature: bool = False
    """Train it, too, between 0.01 and 1; an alignment that goes on starts from the one before."""
    popularity_correction: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """1: negatives weigh as if all items were drawn equally often; 0: as often as they are."""
    learning_rate: PositiveFloat = 1e-3
    """Rate of fusion and projection."""
    lora_learning_rate: PositiveFloat = 2e-4
    weight_decay: NonNegativeFloat = 1e-4
    realign_every_days: PositiveInt | None = None
    """Train on from the last alignment when it is so old: all vectors move, so codebooks are fitted
    anew then. None: the first alignment stays."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        low, high = LEARNED_TEMPERATURES
        if self.learn_temperature and not low <= self.temperature <= high:
            raise ValueError(
                f"temperature={self.temperature} is learned between {low} and {high}; start there, "
                "or set learn_temperature=false"
            )
        return self


ItemVectorSource = Annotated[
    ColumnVectors | TowerVectors | AlignedVectors, Field(discriminator="kind")
]


# --- looking codes up ---------------------------------------------------------------------------


class EncodeWorkers(StrictConfig):
    """Where codes are looked up; they do not depend on it.

    Of items whose vectors have not changed since the run before, with the same codebooks, nothing
    is looked up. Up to `items_per_task` others are in the run's own process, more on Ray workers.
    """

    num_workers: PositiveInt = 4
    """The most workers; fewer where the cluster has no room for them."""
    items_per_task: PositiveInt = 1 << 20
    """Items whose vectors a worker holds at a time."""
    cpus_per_worker: PositiveFloat = 1
    gpus_per_worker: NonNegativeFloat = 0
    """1: workers look codes up on a GPU."""


# --- features -----------------------------------------------------------------------------------

CodeFamily = Literal["candidate", "history", "shared", "user"]


class CodeFeatures(StrictConfig):
    """Which features of the ranker follow from the codes (`multimodal.codes.schema`)."""

    families: tuple[CodeFamily, ...] | None = None
    """`candidate`: codes of the candidate; `history`: code sequences of each history; `shared`:
    history items with the candidate's first code, first two codes (pooled ids, counts); `user`: an
    id of user and code prefix. Default: the first three, as far as codes allow them: ids of users
    and codes are many and rare, and a second epoch over little data learns them by heart."""
    histories: tuple[str, ...] | None = None
    """Histories that the families `history` and `shared` read; default: all of the recipe."""
    embedding_dim: PositiveInt = 16
    """Width of all code tables; a multiple of 4."""
    vector_dims: NonNegativeInt = 0
    """So many first elements of the item vector as dense features: content behind a stop-gradient,
    which codes are compared with."""
    max_prefix: Literal[1, 2] = 2
    """Longest code prefix of the families `shared` and `user`."""
    user_rows: Annotated[int, Field(ge=2)] = 65_537
    """Rows of each hashed table of users and code prefixes."""
    item_table: str | None = None
    """Table of the shared items' ids; default: that of the sparse feature that reads `item_id`."""


class Codes(StrictConfig):
    """Semantic codes of items, and the features that follow from them."""

    vectors: ItemVectorSource = AlignedVectors()
    """What is quantized."""
    vq: Vq | None = Vq()
    rq: Rq | None = Rq()
    suffix: Suffix | None = None
    refit: RefitPolicy = RefitPolicy()
    version: str | None = None
    """Codebooks to use, like v0003, whatever the refit policy says; default: those of the run
    before, or a refit."""
    features: CodeFeatures = CodeFeatures()
    encode: EncodeWorkers = EncodeWorkers()
    taken_from: Path | None = None
    """Output directory whose runs make the codes, for another ranker: this recipe's runs take those
    of their date, and have code tables of their own. rq, vq and suffix are those of the other
    recipe; vectors, refit and encode of this one are not read. None: they make their own."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.taken_from is not None and self.version is not None:
            raise ValueError(
                f"codes.version={self.version} chooses codebooks where codes are made, and these "
                f"are taken from {self.taken_from}; set it in the recipe that makes them"
            )
        if self.vq is None and self.rq is None:
            raise ValueError("codes: vq and rq are both null; keep at least one of them")
        if self.suffix is not None and self.rq is None:
            raise ValueError("codes.suffix tells equal rq codes apart; set rq or remove suffix")
        crosses = {"shared", "user"} & {*(self.features.families or ())}
        if crosses and self.rq is None:
            raise ValueError(
                f"codes.features.families: {sorted(crosses)} read prefixes of rq codes, and rq is "
                "null; set rq or remove them"
            )
        return self

    @property
    def families(self) -> tuple[CodeFamily, ...]:
        """Families of features that are derived."""
        if self.features.families is not None:
            return self.features.families
        return ("candidate", "history", "shared") if self.rq else ("candidate", "history")

    @property
    def has_alignment(self) -> bool:
        """Whether a stage makes the vectors: they are no column, and the codes are not taken."""
        return self.taken_from is None and not isinstance(self.vectors, ColumnVectors)

    def with_seed_offset(self, offset: int) -> Self:
        """The same with other draws of the alignment and of the codebooks; taken ones stay."""
        if self.taken_from is not None:
            return self
        changes: dict[str, Any] = {}
        if self.rq is not None:
            changes["rq"] = self.rq.model_copy(update={"seed": self.rq.seed + offset})
        vectors = self.vectors
        if isinstance(vectors, AlignedVectors):
            content = vectors.content
            if content is not None:
                content = content.model_copy(update={"seed": content.seed + offset})
            drawn = {"seed": vectors.seed + offset, "content": content}
            changes["vectors"] = vectors.model_copy(update=drawn)
        return self.model_copy(update=changes)

    @property
    def quantized(self) -> dict[str, Any]:
        """The settings that codes depend on, as JSON."""
        others: Any = {"features": True, "refit": {"force_on"}, "taken_from": True, "encode": True}
        return {**self.model_dump(mode="json", exclude=others), **self._format}

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that a recipe has in common with that of codes it takes, as JSON."""
        settings = self.model_dump(mode="json", include={"rq", "vq", "suffix"})
        return {**settings, **self._format}

    @property
    def _format(self) -> dict[str, Any]:
        return {"vector_dims": self.features.vector_dims, "format": CODES_FORMAT}


def suggested_codebook_size(num_items: int) -> int:
    """The largest power of two that leaves 16 items a codeword, and at least 2."""
    return max(2, 1 << max(1, num_items // 16).bit_length() - 1)

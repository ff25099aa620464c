"""Configuration of item content trained by the ranking loss (EM3): towers, fusion, placement.

Imports pydantic and nothing heavy, so that a recipe is checked without torch or transformers.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from embedding.config import StrictConfig

TINY = "tiny"
"""Model name of the randomly initialised small towers."""
MAX_PIXELS = 100_000_000
"""Of an image, unless a recipe says otherwise."""

# --- towers --------------------------------------------------------------------------------------


class Lora(StrictConfig):
    """Low-rank updates of a tower's trainable layers."""

    rank: PositiveInt = 8
    """Width of the two factors of an adapter."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    target_modules: tuple[str, ...] | None = None
    """Names (or dotted ends of names) of the linear layers to adapt; None: the query and value
    projections, whatever the architecture calls them."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.target_modules == ():
            raise ValueError("target_modules is empty; name linear layers, or leave it out")
        return self


Precision = Literal["float16", "bfloat16", "float32"]


class AdaptedModel(StrictConfig):
    """A pretrained encoder, and how much of it trains: what towers of all modalities share."""

    model: str = TINY
    """`tiny` (random, built in code), a directory, `package:NAME/DIR` (a directory in an installed
    Python package), or a model hub id with its `revision`."""
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Commit of a hub model, in full: a branch may move between the stage that stores tokens and
    the ranks that train on them, and from one day to the next."""
    trainable_layers: PositiveInt = 1
    """Top layers that run in the training step and carry LoRA; those below run once per item."""
    lora: Lora | None = Lora()
    """None: nothing in the tower trains, and all its layers run once per item."""
    precision: Precision = "float16"
    """How tokens are stored. Training sees the stored values, so it is exact given them."""

    @property
    def layers_in_step(self) -> int:
        """Top layers that run in the training step."""
        return 0 if self.lora is None else self.trainable_layers


class TextTower(AdaptedModel):
    """A text encoder."""

    column: str = "text"
    """Column of items.parquet with the texts."""
    max_tokens: Annotated[int, Field(ge=2, le=4096)] = 32
    """Longer texts are cut, and counted."""


class ImageTower(AdaptedModel):
    """A vision encoder."""

    column: str = "image"
    """Column of items.parquet with the images."""
    image_size: Annotated[int, Field(ge=8, le=2048)] = 32
    """Images are resized to a square of so many pixels; a multiple of the model's patch size."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Larger images are refused before they are decoded, and counted: a small file can claim to be
    huge."""


# --- fusion --------------------------------------------------------------------------------------


class FqFormer(StrictConfig):
    """Learned queries attend, together with the tokens of all modalities, to one another."""

    kind: Literal["fq_former"] = "fq_former"
    num_layers: PositiveInt = 1
    num_heads: PositiveInt = 4
    num_queries: PositiveInt = 2
    dim: PositiveInt | None = None
    """Width of queries and projected tokens; None: `content.dim`. What the projection of a tower's
    tokens drops, training must find again: several times `content.dim` starts from more of them."""
    mean_tokens: bool = False
    """Let the last layer read the mean token of every modality, too, beside the queries' outputs:
    what pretrained towers say reaches the ranker from the first step, and not only as far as the
    queries have learned to ask for it. Not part of the published method."""
    feed_forward: bool = False
    """Adds the two-layer network of a transformer behind the attention of each layer."""
    modality_embedding: bool = False
    """Add a learned vector to the tokens of each modality."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


class MeanFusion(StrictConfig):
    """Projected tokens averaged per modality, then over the modalities that are there."""

    kind: Literal["mean"] = "mean"


class ConcatFusion(StrictConfig):
    """Tokens averaged per modality, side by side; an absent modality is a learned vector."""

    kind: Literal["concat"] = "concat"


Fusion = Annotated[FqFormer | MeanFusion | ConcatFusion, Field(discriminator="kind")]


# --- training ------------------------------------------------------------------------------------


class Gradient(StrictConfig):
    """Which items of a step are encoded with gradient; the others are read from the bank.

    That is of towers and fusion: the last layer is applied to all items of a step, and learns from
    them.
    """

    items: Literal["targets", "targets+sample", "all"] = "targets+sample"
    """The candidates; those and a sample of the history items; or all: of each, no more than
    `max_items_per_step`, so that `all` means 512 items unless that is null."""
    sample_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the history items, drawn anew every step."""
    max_items_per_step: PositiveInt | None = 512
    """Bound on encoded items per rank; those beyond are read from the bank, drawn anew every step.
    None: no bound."""
    history_share: float = Field(default=0.25, ge=0, lt=1)
    """Part of the bound that candidates leave to history items where both do not fit. 0: candidates
    first."""
    refresh_every_steps: PositiveInt | None = None
    """Encode all items anew, without gradient, so often: items that are read from the bank are then
    no older. None: before the first step, before validation and for the result only."""
    micro_batch_items: PositiveInt | None = None
    """Encode so many items at a time and recompute them in backward (activation checkpointing), so
    that memory does not grow with the number of items. None: all at once."""


class Cic(StrictConfig):
    """Content-ID-contrastive loss between an item's content vector and its ID embedding."""

    weight: PositiveFloat = 1e-3
    """Of this loss beside those of the tasks."""
    temperature: PositiveFloat = 0.1
    """Cosines are divided by it: lower ones look at the hardest negatives only."""
    num_negatives: PositiveInt = 16
    """Per item, drawn with replacement; `in_batch` takes all there are instead."""
    negatives: Literal["uniform", "in_batch", "queue"] = "uniform"
    """Candidates of the same rank, never the item itself. `uniform`: drawn from the step's distinct
    candidates, all equally likely; not from the catalogue, whose ID embeddings would take a second
    lookup in the sharded table. `in_batch`: all others of the step's distinct candidates. `queue`:
    drawn from those of earlier steps, without gradient; a draw of the item's own entry is left
    out."""
    queue_size: PositiveInt = 4096
    """Entries of `queue`, of the latest steps; an item has one for every step that showed it."""


class ContentOptimizer(StrictConfig):
    """AdamW of everything in the content encoder."""

    learning_rate: PositiveFloat = 1e-3
    """Rate of the fusion, and of the vectors that stand for what an item lacks."""
    lora_learning_rate: PositiveFloat = 1e-3
    """Of the adapters in the towers."""
    head_learning_rate: PositiveFloat = 1e-3
    """Rate of the last layer, which learns from every item of a step, encoded or not."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = None
    """Bound on the norm of the gradient of towers and fusion together, and on that of the last
    layer; None: none. The ranker's own gradients have `ranking.trainer.max_grad_norm`."""


# --- placement -----------------------------------------------------------------------------------


class Inline(StrictConfig):
    """The encoder is data-parallel on the training ranks."""

    kind: Literal["inline"] = "inline"


class Service(StrictConfig):
    """Ray actors own the encoder; ranks send items, receive vectors and return gradients."""

    kind: Literal["service"] = "service"
    num_actors: PositiveInt = 1
    """Processes that share the items of a step."""
    staleness: Literal[0, 1] = 0
    """0: vectors of step t+1 come from the weights after step t. 1: from those before it, computed
    while the ranks work on step t."""
    timeout_s: PositiveFloat = 60.0
    """Limit of every wait between ranks and actors."""
    cpus_per_actor: NonNegativeFloat = 1
    gpus_per_actor: NonNegativeFloat = 0
    transport: Literal["auto", "object_store", "direct"] = "object_store"
    """How vectors and gradients travel. `object_store`: as messages of Ray, through host memory.
    `direct`: from device to device, by NCCL on GPUs and gloo on CPUs. `auto`: direct where ranks
    and actors have GPUs of their own."""

    def obstacle(self, *, ranks_on_gpu: bool) -> str | None:
        """What keeps ranks and actors from a common process group; None: nothing."""
        gpus = f"gpus_per_actor={self.gpus_per_actor:g}"
        if ranks_on_gpu and not self.gpus_per_actor:
            return f"the ranks run on GPUs and the actors on CPUs ({gpus})"
        if self.gpus_per_actor and not ranks_on_gpu:
            return f"the ranks run on CPUs and the actors on GPUs ({gpus})"
        if 0 < self.gpus_per_actor < 1:
            return f"actors share a GPU ({gpus}), and NCCL takes one process a GPU"
        return None

    def is_direct(self, *, ranks_on_gpu: bool) -> bool:
        """The transport that is used; `direct` stands for itself, whatever the obstacle."""
        if self.transport == "auto":
            return ranks_on_gpu and self.obstacle(ranks_on_gpu=True) is None
        return self.transport == "direct"


Placement = Annotated[Inline | Service, Field(discriminator="kind")]


class TokenStage(StrictConfig):
    """The stage that runs the frozen lower layers, once per item."""

    items_per_batch: PositiveInt = 64
    """Read, decoded and encoded at a time by a worker: bounds its memory."""
    items_per_part: PositiveInt = 2048
    """Items of a file of the store; a worker holds the tokens of one part."""
    num_workers: PositiveInt = 1
    """Processes that run the lower layers over new items, side by side."""
    cpus_per_worker: NonNegativeFloat = 1
    gpus_per_worker: NonNegativeFloat = 0


class ContentConfig(StrictConfig):
    """Text and image of items as content vectors that the ranking loss trains."""

    text: TextTower | None = None
    image: ImageTower | None = None
    dim: PositiveInt = 64
    """Width of the content vector."""
    fusion: Fusion = FqFormer()
    frozen: bool = False
    """Train nothing of the encoder but its last linear layer: an ablation. Items are encoded once,
    in float32, so `gradient`, `precision`, and all rates but `head_learning_rate` have no say."""
    in_history: bool = True
    """Attend from the candidate's content over that of the history."""
    gradient: Gradient = Gradient()
    cic: Cic | None = Cic()
    optimizer: ContentOptimizer = ContentOptimizer()
    placement: Placement = Inline()
    tokens: TokenStage = TokenStage()
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the encoder's matrix products in training run under autocast, those that refresh the
    bank, too; weights, their optimizer, and the vectors that are evaluated and published stay
    fp32."""
    seed: NonNegativeInt = 0
    """Draws the encoder's initial weights."""

    @property
    def towers(self) -> dict[str, TextTower | ImageTower]:
        """Those that are set, by modality."""
        pairs = (("text", self.text), ("image", self.image))
        return {name: tower for name, tower in pairs if tower is not None}

    @property
    def has_dropout(self) -> bool:
        """Whether training draws which activations it drops."""
        loras = [tower.lora for tower in self.towers.values() if tower.lora is not None]
        rates = [lora.dropout for lora in loras]
        if isinstance(self.fusion, FqFormer):
            rates.append(self.fusion.dropout)
        return any(rates)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if not self.towers:
            raise ValueError("text and image are both null; set at least one of them")
        if isinstance(self.fusion, FqFormer):
            name = "dim" if self.fusion.dim is None else "fusion.dim"
            dim, heads = self.fusion.dim or self.dim, self.fusion.num_heads
            if dim % heads:
                raise ValueError(
                    f"{name}={dim} must be a multiple of fusion.num_heads={heads}; use "
                    f"{dim + -dim % heads}"
                )
        trained = [name for name, tower in self.towers.items() if tower.lora is not None]
        if self.frozen and trained:
            raise ValueError(
                f"frozen trains no tower, but {', '.join(trained)} has lora; set "
                f"{trained[0]}.lora to null"
            )
        if self.frozen and isinstance(self.placement, Service):
            raise ValueError(
                "frozen trains only the encoder's last layer, which is the ranks': actors would "
                "have nothing to do; set placement to {kind: inline}"
            )
        if self.text and self.image and self.text.column == self.image.column:
            raise ValueError(f"text and image both read the column {self.text.column!r}; name two")
        return self

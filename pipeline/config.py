"""The recipe: one YAML file that describes a whole daily pipeline.

Imports pydantic and nothing heavy, so that `braid validate` and `--help` never load torch.
"""

from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_validator,
)

from embedding.config import (
    RowWiseAdagrad,
    ShardingConfig,
    SparseOptimizer,
    StrictConfig,
    TablePrecision,
)
from embedding.feature_schema import (
    DenseFeature,
    FeatureSchema,
    HistoryConfig,
    SparseFeature,
)
from embedding.item_columns import candidate_field, item_sequences
from embedding.limits import check_support
from multimodal.codes.config import AlignedVectors, Codes, ColumnVectors
from multimodal.codes.schema import features_with_codes, without_codes
from multimodal.content_config import ContentConfig, Service
from pipeline.gate_config import GateConfig
from ranking.compatibility import check_model, table_widths
from ranking.config import RankingConfig
from ranking.trainer_config import ValidationConfig


class SyntheticConfig(StrictConfig):
    """The synthetic marketplace: its truth, size and seed (`braid data synth`)."""

    num_days: PositiveInt = 8
    first_day: date = date(2024, 1, 1)
    events_per_day: PositiveInt = 20_000
    """Impressions."""
    num_users: PositiveInt = 2_000
    num_items: PositiveInt = 1_000
    """Items alive on one day."""
    births_per_day: float = Field(default=0.05, ge=0, lt=1)
    """Share of the living items replaced by new ones each day."""
    candidates_per_request: PositiveInt = 10
    taste_dim: PositiveInt = 8
    base_rate: float = Field(default=0.2, gt=0, lt=1)
    """Share of impressions that are clicked, about."""
    drift: float = Field(default=0.1, ge=0)
    """Standard deviation of the daily step of popularity and tastes."""
    content_share: float = Field(default=0.8, ge=0, le=1)
    """Share of an item's appeal that its latent (seen in text and image) determines."""
    image_size: int = Field(default=32, ge=8)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.candidates_per_request > self.num_items:
            raise ValueError(
                f"candidates_per_request={self.candidates_per_request} is more than "
                f"num_items={self.num_items}: a request shows no item twice; lower it"
            )
        if self.events_per_day > 86_400_000 * self.candidates_per_request:
            raise ValueError(
                f"events_per_day={self.events_per_day} asks for more than one request a "
                "millisecond; use at most 86400000 * candidates_per_request"
            )
        return self


class DataConfig(StrictConfig):
    """Where the data lies and how strict ingest is."""

    root: Path
    """Directory with events/, items.parquet and users.parquet."""
    synthetic: SyntheticConfig | None = None
    """Generate the synthetic marketplace in `root` when it is not there yet."""
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """Ingest fails when more than this share of a day's rows is quarantined; join, when more than
    this share of its rows or of its past events is of items without a row in items.parquet whose
    columns features read; where towers read images, their stage when those of more than this share
    of the items cannot be read."""
    complete_marker: str | None = Field(default=None, pattern=r"^[^/]+$")
    """Name of the file, e.g. _SUCCESS, that is written into a day's partition of the event log when
    all of it is there. Days without it are not there yet, neither to train nor to evaluate on.
    None: a partition is complete."""
    user_buckets: PositiveInt = 8
    """Users are hashed into this many buckets; one bucket of a span fits in a worker's memory."""


class WindowConfig(StrictConfig):
    """Which days are trained and evaluated for a run of day D."""

    train_days: PositiveInt | None = None
    """Days up to and including D; None: all days there are. A warm-started run trains only the
    days after its parent's."""
    validation_days: NonNegativeInt = 0
    """The last so many days of the training window are not trained but validated on: they choose
    the step that is published (`ranking.trainer.validation`)."""
    eval_days: PositiveInt | None = 1
    """Days after D; None: all days there are."""
    warm_start: bool = True
    """Start from the latest earlier model in the same output directory that passed its gate and was
    not withdrawn from production."""

    @model_validator(mode="after")
    def _check_days(self) -> Self:
        if self.train_days is not None and self.validation_days >= self.train_days:
            raise ValueError(
                f"validation_days={self.validation_days} leaves none of train_days="
                f"{self.train_days} to train on; lower it or raise train_days"
            )
        return self


class EmbeddingPlaneConfig(StrictConfig):
    """Sparse optimizer and sharding of all tables."""

    optimizer: SparseOptimizer = RowWiseAdagrad()
    """After a change of its kind, tables go on with their weights and a new state; from `adagrad`
    to `row_wise_adagrad` with the row means of their state."""
    sharding: ShardingConfig = ShardingConfig()
    l2: NonNegativeFloat = 0.0
    """L2 on the vectors each sample looks up, in the loss (`ranking.regularization`): works with
    every optimizer and device. Adds l2 times the vector to its gradient."""


class ClusterConfig(StrictConfig):
    """Workers of the training group."""

    num_workers: PositiveInt = 2
    """Ranks of the training group: processes that share tables and rows."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs that Ray reserves for a rank, and threads of its torch."""
    use_gpu: bool = False
    """Every rank trains on a GPU of its own (NCCL); else on its CPUs (gloo)."""
    max_failures: NonNegativeInt = 2
    """Restarts of the worker group from the last checkpoint before the stage fails."""
    autoscale_timeout_s: PositiveFloat | None = None
    """Where an autoscaler adds nodes: each stage has it add those it lacks, and waits so long (or
    `wait_timeout_s`). None: the cluster must be large enough when the run begins."""
    wait_timeout_s: PositiveFloat = 3600
    """How long a stage waits for CPUs and GPUs that others on the cluster hold."""


class HeldOutItems(StrictConfig):
    """Items kept from training: their rows are not trained on, and histories lack their events.

    The model is evaluated on their rows alone, so sampled negatives are held-out items, too.
    """

    share: float = Field(default=0.2, gt=0, lt=1)
    """Share of all items, drawn by id."""
    seed: NonNegativeInt = 0
    days: Literal["evaluation", "all"] = "evaluation"
    """Evaluate on their rows of the evaluation days, or of the training days as well: more rows,
    but the model may know what the user did later."""


class EvaluationConfig(StrictConfig):
    """Groups and slices of the metrics. Popularity counts events up to the run's date."""

    group_by: Literal["user_id", "request_id"] = "user_id"
    """Groups of GAUC."""
    rare_max_events: PositiveInt = 10
    """Items with 1 .. this many events are `rare`; items with none are `cold`."""
    popular_share: float = Field(default=0.1, gt=0, le=1)
    """The most frequent items, as a share of all seen ones, are `popular`, but for those that are
    `rare`; of equally frequent ones the lowest ids are. All other seen items are `middle`."""
    held_out_items: HeldOutItems | None = None
    """Evaluate on items that were kept from training instead of on all."""


class PublishConfig(StrictConfig):
    """What becomes of a model that passed its gate."""

    promote: bool = True
    """Put its bundle into production at once. false: publish it only, for one that is to be tried
    first (`braid models promote` does it later)."""
    catch_up: bool = False
    """Once the gate has passed, train on the days that the model was evaluated on, too, and publish
    that. Its figures are those from before: it has seen the rows they are of. The next run takes
    this training over instead of repeating it where it would be the very same: with one evaluation
    day, and catalogue (of content) and codes as they were."""
    tables: TablePrecision = "fp32"
    """How a bundle holds its embedding tables, and whoever scores with it: as trained, or in 8 bits
    an element with scale and bias of every row (28% of the memory at dim 64, 38% at dim 16).
    Training, evaluation and gate are in fp32 all the same. Another value publishes again, and
    trains nothing."""


class Recipe(StrictConfig):
    """A complete daily pipeline."""

    name: str
    """Whose runs these are: an output directory holds those of one name."""
    description: str = ""
    data: DataConfig
    window: WindowConfig = WindowConfig()
    features: FeatureSchema
    """In a loaded recipe with those that follow from `codes`, which are not written out again."""
    content: ContentConfig | None = None
    """Text and image of items, trained by the ranking loss; null switches all of it off."""
    codes: Codes | None = None
    """Semantic codes of items; null switches all of it off."""
    embedding: EmbeddingPlaneConfig = EmbeddingPlaneConfig()
    ranking: RankingConfig
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig
    publish: PublishConfig = PublishConfig()

    @property
    def contents(self) -> dict[str, ContentConfig]:
        """The towers that stages run, by their place in the recipe; codes may have their own."""
        found = {"content": self.content}
        if self.codes is not None and self.codes.has_alignment:
            assert not isinstance(self.codes.vectors, ColumnVectors)
            found["codes.vectors.content"] = self.codes.vectors.content
        return {path: content for path, content in found.items() if content is not None}

    @model_validator(mode="after")
    def _derive_features(self) -> Self:
        own = without_codes(self.features)
        derived = features_with_codes(own, self.codes)
        if self.features not in (own, derived):
            raise ValueError(
                "features: `source: codes` is for features that follow from the section codes; "
                "remove those that are written by hand, and set codes.features instead"
            )
        self.__dict__["features"] = derived  # the model is frozen for everybody else
        return self

    @field_serializer("features", mode="wrap")
    def _own_features(self, features: FeatureSchema, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(without_codes(features))

    @model_validator(mode="after")
    def _check_vectors(self) -> Self:
        if self.codes is None or not self.codes.has_alignment:
            return self
        vectors = self.codes.vectors
        assert not isinstance(vectors, ColumnVectors)
        if vectors.content is None and self.content is None:
            raise ValueError(
                f"codes.vectors: vectors of kind {vectors.kind!r} are made of towers, and there "
                "are none; set codes.vectors.content (or content), or choose kind column"
            )
        if isinstance(vectors, AlignedVectors):
            _check_pairs(vectors, {h.name: h for h in self.features.histories})
            if vectors.batch_size < self.cluster.num_workers:
                raise ValueError(
                    f"codes.vectors.batch_size={vectors.batch_size} pairs a step leave some of the "
                    f"cluster.num_workers={self.cluster.num_workers} ranks without any; set one "
                    "of the two so that every rank has a pair"
                )
        return self

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        num_content_fields = 0
        if self.content is not None:
            num_content_fields = 1 + len(self.features.histories) * self.content.in_history
        check_model(self.features, self.ranking.model, num_content_fields)
        check_support(
            table_widths(self.features, self.ranking.model),
            self.embedding.optimizer,
            self.embedding.sharding,
            "cuda" if self.cluster.use_gpu else "cpu",
        )
        return self

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        _check_validation(self.window, self.ranking)
        if self.content is not None and self.content.in_history:
            item_sequences(self.features)
        if self.content is not None and self.content.cic is not None:
            candidate_field(self.features)
        _check_transport(self.content, self.cluster)
        _check_hosts(self.embedding.sharding.ranks_per_host, self.cluster.num_workers)
        if self.evaluation.held_out_items is not None and self.window.warm_start:
            raise ValueError(
                "evaluation.held_out_items keeps items from training, and a warm start would bring "
                "weights that may have seen them; set window.warm_start to false"
            )
        if self.publish.catch_up and self.window.validation_days:
            raise ValueError(
                "publish.catch_up trains on all days there are, and window.validation_days holds "
                "some back to say when a training is over; set one of the two"
            )
        if self.evaluation.held_out_items is not None and self.publish.catch_up:
            raise ValueError(
                "publish.catch_up trains on the days that the model was evaluated on, and "
                "evaluation.held_out_items evaluates on items that are never trained on; set one "
                "of the two"
            )
        labels = [task.label_name for task in self.ranking.tasks]
        for history in self.features.histories:
            if history.label is not None and history.label not in labels:
                raise ValueError(
                    f"features.histories: label {history.label!r} is not a task's label {labels}"
                )
        _check_leaks(self.features, self.ranking)
        self.gate.check_tasks([task.name for task in self.ranking.tasks])
        return self


def _check_leaks(features: FeatureSchema, ranking: RankingConfig) -> None:
    """No feature is what is to be predicted; sequences of past labels are fine."""
    secret = {task.label_name: "label" for task in ranking.tasks}
    secret |= {task.oracle_name: "true probability" for task in ranking.tasks}
    read: list[SparseFeature | DenseFeature] = [*features.sparse, *features.dense]
    for feature in read:
        if feature.source == "events" and feature.column_name in secret:
            raise ValueError(
                f"features: {feature.name!r} reads the column {feature.column_name!r}, the "
                f"{secret[feature.column_name]} of a task, which is not known when items are "
                "ranked; leave it out (a sequence may read it of past events)"
            )


def _check_pairs(vectors: AlignedVectors, histories: dict[str, HistoryConfig]) -> None:
    wanted = vectors.history or next(iter(histories), None)
    if wanted not in histories:
        raise ValueError(
            f"codes.vectors.history: pairs come from the events of a history, and {wanted!r} is "
            f"not among {[*histories]}; name one, add one, or choose kind towers"
        )
    history = histories[wanted]
    if history.columns is not None and history.label is None:
        raise ValueError(
            f"codes.vectors.history: pairs are of events with label 1, and the history {wanted!r}, "
            "which the log delivers, has no label; name the label of the events that it holds"
        )
    looked_at = vectors.user2item.max_history if vectors.user2item else None
    if looked_at is not None and looked_at > history.max_length:
        raise ValueError(
            f"codes.vectors.user2item.max_history={looked_at}, but the history {wanted!r} keeps "
            f"{history.max_length} events; lower it, or raise the max_length of that one of "
            "features.histories"
        )


def _check_transport(content: ContentConfig | None, cluster: ClusterConfig) -> None:
    if content is None or not isinstance(content.placement, Service):
        return
    obstacle = content.placement.obstacle(ranks_on_gpu=cluster.use_gpu)
    if content.placement.transport == "direct" and obstacle is not None:
        raise ValueError(
            f"content.placement.transport=direct needs ranks and actors on devices of one kind, "
            f"each on its own, but with cluster.use_gpu={str(cluster.use_gpu).lower()} {obstacle}; "
            f"set gpus_per_actor to {int(cluster.use_gpu)}, or transport to object_store"
        )


def _check_hosts(ranks_per_host: int | None, num_workers: int) -> None:
    if ranks_per_host is not None and num_workers % ranks_per_host:
        raise ValueError(
            f"embedding.sharding.ranks_per_host={ranks_per_host} does not divide "
            f"cluster.num_workers={num_workers}; leave it out (what the cluster reports), or set a "
            "divisor"
        )


def _check_validation(window: WindowConfig, ranking: RankingConfig) -> None:
    if window.validation_days:
        return
    unchanged = dict(ValidationConfig())
    chosen = dict(ranking.trainer.validation)
    given = [f"validation.{key}" for key, value in chosen.items() if value != unchanged[key]]
    if ranking.trainer.schedule.plateau is not None:
        given.append("schedule.plateau")
    if given:
        raise ValueError(
            f"ranking.trainer.{given[0]} acts on held-out days, and there are none; set "
            "window.validation_days to 1 or more, or leave it out"
        )

"""Whether a model fits a feature schema, and how wide it makes the tables.

Imports nothing heavy, so that `braid validate` says it without torch.
"""

from collections import Counter

from embedding.config import Identity
from embedding.errors import UserError, not_among
from embedding.feature_schema import FeatureSchema
from ranking.classifier_config import READ_ANY_DIMS, Dlrm
from ranking.config import ModelConfig
from ranking.interest_config import Hstu, InterestConfig

_MAX_GAP_ROWS = 256


def check_model(schema: FeatureSchema, model: ModelConfig, num_content_fields: int = 0) -> None:
    """Refuse interests, a generator, a classifier or a dropout that the schema does not suit.

    Args:
        schema: of the features.
        model: that reads them.
        num_content_fields: fields of items' content beside those of features.

    Raises:
        UserError: what does not fit, where, and what to change.
    """
    fields = [feature.name for feature in schema.sparse]
    for name in model.field_dropout:
        if name not in fields:
            raise UserError(
                "ranking.model.field_dropout: "
                f"{not_among(name, 'sparse features', fields, 'name one of them')}"
            )
    for interest in model.interests:
        check_interest(schema, interest)
    num_fields = num_classifier_fields(schema, model) + num_content_fields
    if isinstance(model.classifier, Dlrm):
        num_fields += bool(schema.dense)  # dense features are one field together
    if model.generator is not None:
        common_dim(schema, model, "ranking.model.generator: fgcnn")
    if not isinstance(model.classifier, READ_ANY_DIMS):
        kind = model.classifier.kind
        common_dim(schema, model, f"ranking.model.classifier: {kind}")
        if num_fields < 2:
            raise UserError(
                f"ranking.model.classifier: {kind} combines fields, but there is {num_fields}; "
                "add a sparse feature, or choose the classifier dnn or dcn_v2"
            )


def check_interest(schema: FeatureSchema, interest: InterestConfig) -> None:
    """Refuse an interest whose history is not there, or has nothing that the block needs.

    Raises:
        UserError: what is missing, and what to change.
    """
    histories = [history.name for history in schema.histories]
    if interest.history not in histories:
        raise UserError(
            "ranking.model.interests: history "
            f"{not_among(interest.history, 'histories', histories, 'name one of them')}"
        )
    sequences = [s for s in schema.sequences if s.history == interest.history]
    if all(sequence.target is None for sequence in sequences):
        raise UserError(
            f"ranking.model.interests: no sequence of history {interest.history!r} names a "
            "target, so there is nothing to compare the candidate with; give one of "
            f"{[s.name for s in sequences]} a target"
        )
    if isinstance(interest, Hstu):
        num_gap_rows(schema, interest)


def num_gap_rows(schema: FeatureSchema, hstu: Hstu) -> int | None:
    """Rows of the table of gaps that an HSTU interest has a bias for; None if it has none.

    Raises:
        UserError: the gap is no sequence of the history, or its table does not count gaps.
    """
    if hstu.gap is None:
        return None
    sequences = [s for s in schema.sequences if s.history == hstu.history]
    gaps = {s.name: schema.table(s.table) for s in sequences if s.source == "gap"}
    table = gaps.get(hstu.gap)
    if table is None:
        raise UserError(
            f"ranking.model.interests: gap {hstu.gap!r} is not among the sequences of history "
            f"{hstu.history!r} with source gap {sorted(gaps)}; name one of them, or leave it out"
        )
    if not isinstance(table.ids, Identity) or table.num_embeddings > _MAX_GAP_ROWS:
        raise UserError(
            f"ranking.model.interests: gap {hstu.gap!r} uses table {table.name!r} with "
            f"{table.ids.kind} ids and {table.num_embeddings} rows, but a bias for each pair of "
            f"gaps needs identity ids and at most {_MAX_GAP_ROWS} rows; set ids: {{kind: "
            "identity}} and num_embeddings: 34"
        )
    return table.num_embeddings


def num_classifier_fields(schema: FeatureSchema, model: ModelConfig) -> int:
    """Fields of features that the classifier reads, new ones included.

    Raises:
        UserError: a pool of the generator leaves no field.
    """
    raw = len(schema.sparse)
    if model.generator is None:
        return raw
    try:
        new = sum(model.generator.num_new_features(raw))
    except ValueError as error:
        raise UserError(f"ranking.model.generator.{error}") from error
    return new + raw if model.generator.raw_features else new


def common_dim(schema: FeatureSchema, model: ModelConfig, needed_by: str) -> int:
    """The one dim of all fields, after projection.

    Raises:
        UserError: the dims differ; names the tables to change.
    """
    if model.field_dim is not None:
        return model.field_dim
    dims = {f.table: schema.table(f.table).embedding_dim for f in schema.sparse}
    if not dims:
        raise UserError(f"{needed_by} needs sparse features, and features.sparse is empty; add one")
    (usual, _), *others = Counter(dims.values()).most_common()
    if others:
        odd = {table: dim for table, dim in dims.items() if dim != usual}
        raise UserError(
            f"{needed_by} combines embeddings of one dim, but most tables have embedding_dim="
            f"{usual} and {odd} differ; set features.tables.<name>.embedding_dim={usual} there, or "
            f"ranking.model.field_dim={usual} to project them"
        )
    return usual


def table_widths(schema: FeatureSchema, model: ModelConfig) -> FeatureSchema:
    """The schema with the true widths of its tables: the generator's columns included.

    A row of a table that fields read is [classifier's columns | generator's columns], so both
    vectors of an id come from one lookup. Row-wise Adagrad keeps one accumulator for both: it
    averages the squared gradients of all columns, so the side with the smaller gradients takes
    smaller steps than it would alone. Adagrad and Adam, with a state an element, keep the two
    sides apart.
    """
    if model.generator is None or model.generator.embeddings == "shared":
        return schema
    dim = common_dim(schema, model, "ranking.model.generator: fgcnn")
    read = {feature.table for feature in schema.sparse}
    tables = tuple(
        table.model_copy(update={"embedding_dim": table.embedding_dim + dim})
        if table.name in read
        else table
        for table in schema.tables
    )
    return schema.model_copy(update={"tables": tables})

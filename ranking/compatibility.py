"""Whether a model fits a feature schema, and how wide it makes the tables.

Imports nothing heavy, so that `braid validate` says it without torch.
"""

from collections import Counter

from embedding.config import FeatureSchema
from embedding.errors import UserError
from ranking.classifier_config import READ_ANY_DIMS
from ranking.config import ModelConfig


def check_model(schema: FeatureSchema, model: ModelConfig) -> None:
    """Refuse a generator or a classifier that the schema's fields do not suit.

    Raises:
        UserError: what does not fit, where, and what to change.
    """
    num_fields = num_classifier_fields(schema, model)
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


def num_classifier_fields(schema: FeatureSchema, model: ModelConfig) -> int:
    """Fields the classifier reads, new ones included.

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

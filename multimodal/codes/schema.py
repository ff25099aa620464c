"""The ranker's features that follow from semantic codes: tables, candidate, histories, crosses.

Derived features have `source: codes` and columns that `pipeline.codes.columns` makes:

    sid_0, ..., sid_suffix, vq      codes of the candidate
    sid_0 of a sequence             codes of the history's items
    vq_nearest of a sequence        the history's items by their own VQ slots
    clicks:shared_1                 items of the history with the candidate's first code
    clicks:shared_1_count           how many
    user_code_1                     id of the user and the candidate's first code
    vector_0, ...                   elements of the candidate's vector

Imports pydantic and nothing heavy, so that a recipe is checked without torch.
"""

from embedding.config import Identity, TableConfig
from embedding.feature_schema import (
    DenseFeature,
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.item_columns import candidate_feature
from multimodal.codes.config import Codes


def features_with_codes(own: FeatureSchema, codes: Codes | None) -> FeatureSchema:
    """The recipe's own features and those that follow from its codes.

    Raises:
        ValueError: a name is taken, a history is unknown, or shared items have no table.
    """
    if codes is None:
        return own
    tables = _tables(codes)
    _refuse_taken("table", [t.name for t in own.tables], [t.name for t in tables])
    sparse = _candidate(codes)
    dense = [
        DenseFeature(name=f"vector_{i}", source="codes") for i in range(codes.features.vector_dims)
    ]
    sequences: list[SequenceFeature] = []
    for history in _histories(own, codes):
        sequences += _sequences(history, codes)
        sparse += _shared(history, own, codes)
        dense += _counts(history, codes)
    _refuse_taken(
        "feature",
        [f.name for f in own.id_features] + [f.name for f in own.dense],
        [f.name for f in sparse] + [f.name for f in dense] + [f.name for f in sequences],
    )
    used = {f.table for f in sparse} | {f.table for f in sequences}
    return FeatureSchema(
        tables=(*own.tables, *(table for table in tables if table.name in used)),
        sparse=(*own.sparse, *sparse),
        dense=(*own.dense, *dense),
        histories=own.histories,
        sequences=(*own.sequences, *sequences),
    )


def without_codes(schema: FeatureSchema) -> FeatureSchema:
    """The schema without derived features and the tables that only those read."""
    kept = {
        part: tuple(f for f in getattr(schema, part) if f.source != "codes")
        for part in ("sparse", "dense", "sequences")
    }
    if all(len(features) == len(getattr(schema, part)) for part, features in kept.items()):
        return schema
    used = {feature.table for feature in (*kept["sparse"], *kept["sequences"])}
    tables = tuple(table for table in schema.tables if table.name in used)
    return schema.model_copy(update={**kept, "tables": tables})


def code_tables(codes: Codes) -> dict[str, int]:
    """Rows of the table of each code column, the OOV row included."""
    sizes = {f"sid_{i}": size for i, size in enumerate(codes.rq.level_sizes)} if codes.rq else {}
    if codes.suffix:
        sizes["sid_suffix"] = codes.suffix.num_codes
    if codes.vq:
        sizes["vq"] = codes.vq.max_items
    return {column: size + 1 for column, size in sizes.items()}


def _tables(codes: Codes) -> list[TableConfig]:
    dim = codes.features.embedding_dim
    tables = [
        TableConfig(name=name, num_embeddings=rows, embedding_dim=dim, ids=Identity())
        for name, rows in code_tables(codes).items()
    ]
    if "user" in codes.families:
        tables += [
            TableConfig(name=name, num_embeddings=codes.features.user_rows, embedding_dim=dim)
            for name in _user_codes(codes)
        ]
    return tables


def _candidate(codes: Codes) -> list[SparseFeature]:
    found = []
    if "candidate" in codes.families:
        found = [
            SparseFeature(
                name=column,
                table=column,
                source="codes",
                pooling="mean" if column == "vq" else "sum",
                max_length=codes.vq.top_k if codes.vq and column == "vq" else None,
            )
            for column in code_tables(codes)
        ]
    if "user" in codes.families:
        found += [SparseFeature(name=n, table=n, source="codes") for n in _user_codes(codes)]
    return found


def _histories(own: FeatureSchema, codes: Codes) -> list[HistoryConfig]:
    wanted = codes.features.histories
    known = [history.name for history in own.histories]
    if wanted is None:
        return list(own.histories)
    unknown = sorted({*wanted} - {*known})
    if unknown:
        raise ValueError(
            f"codes.features.histories: {unknown} are not among the histories {known}; add them to "
            "features.histories or leave them out"
        )
    return [history for history in own.histories if history.name in wanted]


def _sequences(history: HistoryConfig, codes: Codes) -> list[SequenceFeature]:
    if "history" not in codes.families:
        return []
    # A suffix only tells items with equal codes apart, so a sequence of suffixes says nothing.
    levels = range(len(codes.rq.level_sizes)) if codes.rq else ()
    columns = {f"sid_{level}": f"sid_{level}" for level in levels}
    if codes.vq:
        columns["vq"] = "vq_nearest"
    with_target = "candidate" in codes.families
    return [
        SequenceFeature(
            name=f"{history.name}_{table}",
            history=history.name,
            table=table,
            source="codes",
            column=column,
            target=table if with_target else None,
        )
        for table, column in columns.items()
    ]


def _shared(history: HistoryConfig, own: FeatureSchema, codes: Codes) -> list[SparseFeature]:
    if "shared" not in codes.families:
        return []
    item_table = codes.features.item_table or _item_table(own)
    return [
        SparseFeature(
            name=f"{history.name}_shared_{depth}",
            table=item_table,
            source="codes",
            column=f"{history.name}:shared_{depth}",
            pooling="mean",
            max_length=history.max_length,
        )
        for depth in _depths(codes)
    ]


def _counts(history: HistoryConfig, codes: Codes) -> list[DenseFeature]:
    if "shared" not in codes.families:
        return []
    return [
        DenseFeature(
            name=f"{history.name}_shared_{depth}_count",
            source="codes",
            column=f"{history.name}:shared_{depth}_count",
            transform="log1p",
        )
        for depth in _depths(codes)
    ]


def _user_codes(codes: Codes) -> list[str]:
    return [f"user_code_{depth}" for depth in _depths(codes)]


def _depths(codes: Codes) -> range:
    """Lengths of the code prefixes that crosses read."""
    assert codes.rq
    return range(1, 1 + min(codes.features.max_prefix, len(codes.rq.level_sizes)))


def _item_table(own: FeatureSchema) -> str:
    feature = candidate_feature(own)
    if feature is not None:
        return feature.table
    raise ValueError(
        "codes: the ids of shared items need a table, and no sparse feature reads item_id; add "
        "one, name a table in codes.features.item_table, or leave `shared` out of "
        "codes.features.families"
    )


def _refuse_taken(what: str, own: list[str], derived: list[str]) -> None:
    taken = sorted({*own} & {*derived})
    if taken:
        raise ValueError(
            f"features: the {what} names {taken} belong to features that follow from codes; rename "
            "yours"
        )

"""Which features follow from codes, and that no name of the recipe is taken."""

import pytest

from embedding.feature_schema import FeatureSchema
from multimodal.codes.config import Codes
from multimodal.codes.schema import code_tables, features_with_codes, without_codes

OWN = FeatureSchema.model_validate(
    {
        "tables": [
            {"name": "item", "num_embeddings": 100},
            {"name": "user", "num_embeddings": 100},
        ],
        "sparse": [{"name": "film", "table": "item", "column": "item_id"}],
        "histories": [{"name": "clicks", "max_length": 7}, {"name": "likes", "max_length": 5}],
        "sequences": [
            {"name": "clicked", "history": "clicks", "table": "user", "column": "item_id"}
        ],
    }
)
CODES = Codes.model_validate(
    {
        "rq": {"num_levels": 2, "codebook_size": 16},
        "vq": {"top_k": 3, "max_items": 50},
        "features": {
            "families": ["candidate", "history", "shared", "user"],
            "histories": ["clicks"],
            "embedding_dim": 8,
        },
    }
)


def test_every_family_is_derived() -> None:
    schema = features_with_codes(OWN, CODES)

    rows = {table.name: table.num_embeddings for table in schema.tables}
    assert rows == {
        **{"item": 100, "user": 100, "sid_0": 17, "sid_1": 17, "vq": 51},
        **{"user_code_1": 65_537, "user_code_2": 65_537},
    }
    assert [table.ids.kind for table in schema.tables[2:]] == ["identity"] * 3 + ["hashed"] * 2
    sparse = {f.name: (f.table, f.column_name, f.max_length) for f in schema.sparse[1:]}
    assert sparse == {
        "sid_0": ("sid_0", "sid_0", None),
        "sid_1": ("sid_1", "sid_1", None),
        "vq": ("vq", "vq", 3),
        "user_code_1": ("user_code_1", "user_code_1", None),
        "user_code_2": ("user_code_2", "user_code_2", None),
        "clicks_shared_1": ("item", "clicks:shared_1", 7),
        "clicks_shared_2": ("item", "clicks:shared_2", 7),
    }
    assert [f.name for f in schema.dense] == ["clicks_shared_1_count", "clicks_shared_2_count"]
    attended = {s.name: (s.history, s.column_name, s.target) for s in schema.sequences[1:]}
    assert attended == {
        "clicks_sid_0": ("clicks", "sid_0", "sid_0"),
        "clicks_sid_1": ("clicks", "sid_1", "sid_1"),
        "clicks_vq": ("clicks", "vq_nearest", "vq"),
    }
    assert without_codes(schema) == OWN
    assert features_with_codes(OWN, None) is OWN


def test_all_histories_are_read_unless_some_are_named() -> None:
    codes = Codes.model_validate({"vq": None, "features": {"families": ["history"]}})
    schema = features_with_codes(OWN, codes)
    assert {s.history for s in schema.sequences if s.source == "codes"} == {"clicks", "likes"}
    assert all(s.target is None for s in schema.sequences)
    assert schema.sparse == OWN.sparse


def test_a_suffix_and_an_fsq_level_have_tables_of_their_size() -> None:
    codes = Codes.model_validate(
        {
            "vq": None,
            "rq": {"num_levels": 1, "codebook_size": 4, "fsq": {"num_directions": 3}},
            "suffix": {"num_codes": 5},
        }
    )
    assert code_tables(codes) == {"sid_0": 5, "sid_1": 9, "sid_suffix": 6}
    names = [f.name for f in features_with_codes(OWN, codes).sequences]
    assert names == ["clicked", "clicks_sid_0", "clicks_sid_1", "likes_sid_0", "likes_sid_1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histories": ["views"]}, r"histories: \['views'\] are not among .*'clicks', 'likes'"),
        ({"item_table": "films"}, r"table 'films' is not among the tables"),
    ],
)
def test_references_that_lead_nowhere_are_refused(change: dict, message: str) -> None:
    codes = Codes.model_validate({"features": change})
    with pytest.raises(ValueError, match=message):
        features_with_codes(OWN, codes)


def test_shared_items_need_a_table() -> None:
    schema = OWN.model_copy(update={"sparse": ()})
    with pytest.raises(ValueError, match="no sparse feature reads item_id; add one, name a table"):
        features_with_codes(schema, CODES)


def test_names_of_derived_tables_and_features_are_not_free() -> None:
    tables = (OWN.tables[0].model_copy(update={"name": "sid_0"}), OWN.tables[1])
    with pytest.raises(ValueError, match=r"table names \['sid_0'\] belong to features that follow"):
        features_with_codes(OWN.model_copy(update={"tables": tables}), CODES)
    sparse = (OWN.sparse[0].model_copy(update={"name": "vq"}),)
    with pytest.raises(ValueError, match=r"feature names \['vq'\] belong"):
        features_with_codes(OWN.model_copy(update={"sparse": sparse}), CODES)


def test_crosses_without_rq_codes_are_refused_only_where_they_were_asked_for() -> None:
    assert Codes(rq=None).families == ("candidate", "history")
    with pytest.raises(ValueError, match=r"\['shared'\] read prefixes of rq codes"):
        Codes.model_validate({"rq": None, "features": {"families": ["shared"]}})

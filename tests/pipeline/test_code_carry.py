"""Rows of code tables over a refit, as the warm start sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedding.config import FeatureSchema
from embedding.errors import UserError
from embedding.row_carry import CarriedRows, RowCarry
from multimodal.code_schema import features_with_codes
from multimodal.codebook_versions import carries_between, descends
from multimodal.codes_config import Codes
from pipeline.code_carry import row_carries
from pipeline.quantize import ItemVectors, quantize
from pipeline.train import CodebookChange
from tests.multimodal.code_rows import optimizer_rows, table_rows

CODES = Codes.model_validate(
    {
        "rq": {"num_levels": 2, "codebook_size": 8},
        "vq": {"top_k": 2, "max_items": 90},
        "suffix": {"num_codes": 4},
        "features": {"families": ["candidate", "history", "shared", "user"]},
    }
)
OWN = FeatureSchema.model_validate(
    {
        "tables": [{"name": "item", "num_embeddings": 50}],
        "sparse": [{"name": "item_id", "table": "item"}],
        "histories": [{"name": "clicks"}],
    }
)
SCHEMA = features_with_codes(OWN, CODES)


def versions(root: Path, *, keep_meaning: bool = True) -> CodebookChange:
    """Codebooks of 60 items, and of 70 of which 50 are the same."""
    policy = CODES.refit.model_copy(update={"keep_meaning": keep_meaning})
    codes = CODES.model_copy(update={"refit": policy})
    rng = np.random.default_rng(0)
    x = (
        rng.standard_normal((8, 6))[np.arange(80) % 8] + 0.2 * rng.standard_normal((80, 6))
    ).astype(np.float32)
    version = None
    for day, rows in enumerate((np.arange(60), np.arange(10, 80))):
        scratch = root / f"day-{day}"
        scratch.mkdir(parents=True)
        last_day = f"2026-01-0{day + 1}"
        items = ItemVectors(rows, x[rows], "tower", "2026-01-01", last_day, version=version)
        version = quantize(codes, items, root, scratch, force_refit=day > 0).version
    return CodebookChange(root=root, before="v0001", after="v0002")


def applied(carry: RowCarry, before: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    rows = start.clone()
    for row, source in enumerate(carry.source_R.tolist()):
        if source >= 0:
            rows[row] = before[source]
    return rows


def test_rows_go_where_their_codes_went(tmp_path: Path) -> None:
    change = versions(tmp_path)

    found = row_carries(change, SCHEMA)

    expected = carries_between(tmp_path, "v0001", "v0002")
    assert set(found) == set(expected) == {"sid_0", "sid_1", "vq"}
    for column, carry in expected.items():
        before = torch.randn(carry.num_before + 1, 3)
        start = torch.randn(len(carry.source_K) + 1, 3)
        assert torch.equal(applied(found[column], before, start), table_rows(carry, before, start))
        state = applied(
            RowCarry(0, found[column].source_R.where(found[column].carried_R, -1), torch.ones(1)),
            before,
            start,
        )
        assert torch.equal(state, optimizer_rows(carry, before, start))
    counts = found["vq"].counts
    # 50 items and the OOV row stay; 20 came, 10 of them into slots that were left.
    assert counts == CarriedRows(carried=51, sourced=20, redrawn=0)
    found["vq"].check("vq", 91, 91)


def test_renumbered_codebooks_redraw_every_table_that_codes_index(tmp_path: Path) -> None:
    change = versions(tmp_path, keep_meaning=False)

    found = row_carries(change, SCHEMA)

    assert not descends(tmp_path, "v0001", "v0002")
    rows = {name: carry.counts.redrawn + 1 for name, carry in found.items()}
    assert rows == {
        **{"sid_0": 9, "sid_1": 9, "sid_suffix": 5, "vq": 91},
        **{"user_code_1": 65_537, "user_code_2": 65_537},
    }


def test_a_table_of_item_ids_that_only_a_sequence_reads_is_no_code_table(tmp_path: Path) -> None:
    change = versions(tmp_path, keep_meaning=False)
    own = FeatureSchema.model_validate(
        {
            "tables": [{"name": "past", "num_embeddings": 50}],
            "sparse": [],
            "histories": [{"name": "clicks"}],
            "sequences": [
                {"name": "past_item", "history": "clicks", "table": "past", "column": "item_id"}
            ],
        }
    )
    features = CODES.features.model_copy(update={"item_table": "past"})
    codes = CODES.model_copy(update={"features": features})

    assert "past" not in row_carries(change, features_with_codes(own, codes))


def test_a_table_with_fewer_rows_than_codes_is_refused(tmp_path: Path) -> None:
    change = versions(tmp_path)
    smaller = CODES.model_copy(update={"vq": CODES.vq.model_copy(update={"max_items": 60})})  # type: ignore[union-attr]
    with pytest.raises(UserError, match="table vq has 61 rows, and its codebook 70 codes"):
        row_carries(change, features_with_codes(OWN, smaller))
    with pytest.raises(UserError, match="codebook version 'v0007' is not in"):
        row_carries(change.model_copy(update={"before": "v0007"}), SCHEMA)

"""Rows of code tables over a refit, as the warm start sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.row_carry import RowCarry
from embedding.warm_start_report import CarriedRows
from multimodal.codes.config import Codes
from multimodal.codes.schema import features_with_codes
from multimodal.codes.versions import are_related, carries_between, load_version
from pipeline.codes.carry import LEAST_CARRIED, row_carries
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.quantize import quantize
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


def test_a_rollback_gives_rows_back_to_their_codes(tmp_path: Path) -> None:
    """Trained with v0001, then with v0002, then rolled back: rows that spell what they mean."""
    forth = versions(tmp_path)
    change = CodebookChange(root=tmp_path, before="v0002", after="v0001")

    found = row_carries(change, SCHEMA)

    # VQ slots: by the items that both codebooks have.
    before, after = (load_version(tmp_path, version).items for version in ("v0002", "v0001"))
    assert before
    assert after
    rows = torch.from_numpy(np.append(-9, before.item_ids_N)).unsqueeze(1)
    back = applied(found["vq"], rows, torch.full((len(after.item_ids_N) + 1, 1), -1))
    shared = np.isin(after.item_ids_N, before.item_ids_N)
    assert shared.sum() == 50
    assert (back[1:, 0].numpy()[shared] == after.item_ids_N[shared]).all()
    assert found["vq"].carried_R[1:].numpy().tolist() == shared.tolist()
    assert back[0, 0] == -9
    # RQ codes: a row that went forth comes back, at whichever number.
    for column in ("sid_0", "sid_1"):
        there = carries_between(tmp_path, "v0001", "v0002")[column]
        first = torch.arange(10.0, 19.0).unsqueeze(1)
        second = applied(row_carries(forth, SCHEMA)[column], first, torch.zeros(9, 1))
        again = applied(found[column], second, torch.full((9, 1), -1.0))
        kept = [0, *(1 + there.source_K[there.carried_K])]
        assert len(kept) > 4
        assert torch.equal(again[kept], first[kept])
        assert found[column].carried_R.nonzero().squeeze(1).tolist() == sorted(kept)
    with pytest.raises(UserError, match="codebook version 'v0007' is not in"):
        row_carries(change.model_copy(update={"after": "v0007"}), SCHEMA)


def test_a_refit_after_a_rollback_takes_the_way_over_the_common_version(tmp_path: Path) -> None:
    """v0002 and v0003 both go on with v0001."""
    versions(tmp_path)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((60, 6)).astype(np.float32)
    scratch = tmp_path / "other"
    scratch.mkdir()
    items = ItemVectors(np.arange(60), x, "tower", "2026-01-01", "2026-01-03", version="v0001")
    assert quantize(CODES, items, tmp_path, scratch, force_refit=True).version == "v0003"

    whole = carries_between(tmp_path, "v0002", "v0003")

    steps = [carries_between(tmp_path, *pair) for pair in (("v0002", "v0001"), ("v0001", "v0003"))]
    for column, carry in whole.items():
        sizes = [len(step[column].source_K) + 1 for step in steps]
        tables = [torch.randn(size, 3) for size in (steps[0][column].num_before + 1, *sizes)]
        between = table_rows(steps[0][column], tables[0], tables[1])
        expected = table_rows(steps[1][column], between, tables[2])
        known = np.append(True, carry.source_K >= 0)
        assert torch.equal(table_rows(carry, tables[0], tables[2])[known], expected[known])
    items_of = {v: load_version(tmp_path, v).items for v in ("v0002", "v0003")}
    ids = {v: book.item_ids_N for v, book in items_of.items() if book}
    both = np.isin(ids["v0003"], ids["v0002"])
    assert (ids["v0002"][whole["vq"].source_K[both]] == ids["v0003"][both]).all()
    assert whole["vq"].carried_K.tolist() == both.tolist()


@pytest.mark.parametrize("same", [True, False])
def test_rows_of_users_and_codes_start_anew_where_most_codes_changed(
    tmp_path: Path, same: bool
) -> None:
    """The second day's vectors are those of the first, or quite others under the same encoder."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((8, 6))
    x = centres[np.arange(60) % 8] + 0.1 * rng.standard_normal((60, 6))
    other = x if same else 9 * rng.standard_normal((60, 6))
    version = None
    for day, vectors in enumerate((x, other)):
        scratch = tmp_path / f"day-{day}"
        scratch.mkdir()
        items = ItemVectors(
            np.arange(60),
            vectors.astype(np.float32),
            *("tower", "2026-01-01", f"2026-01-0{day + 1}"),
            version=version,
        )
        version = quantize(CODES, items, tmp_path, scratch, force_refit=day > 0).version
    change = CodebookChange(root=tmp_path, before="v0001", after="v0002")

    found = row_carries(change, SCHEMA)

    carries = carries_between(tmp_path, "v0001", "v0002")
    shares = [carries[f"sid_{level}"].carried_K.mean() for level in (0, 1)]
    for depth in (1, 2):
        is_anew = bool(np.prod(shares[:depth]) < LEAST_CARRIED)
        assert is_anew == (f"user_code_{depth}" in found)
        if is_anew:
            assert found[f"user_code_{depth}"].counts.redrawn == 65_536
    assert ("user_code_2" in found) != same


def test_renumbered_codebooks_redraw_every_table_that_codes_index(tmp_path: Path) -> None:
    change = versions(tmp_path, keep_meaning=False)

    found = row_carries(change, SCHEMA)

    assert not are_related(tmp_path, "v0001", "v0002")
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

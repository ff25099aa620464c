"""The codes of a week: frozen codebooks, births, a refit, another encoder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedding.errors import UserError
from multimodal.codes.config import CodeFeatures, Codes, RefitPolicy, Rq, Suffix, Vq
from multimodal.codes.versions import carries_between, find_version, load_version
from pipeline.codes.features import CODES_FILE, ItemCodes, candidate_columns
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.quantize import quantize
from pipeline.codes.quantize_facts import Quantized, collapse_warning
from tests.multimodal.code_rows import table_rows

CONFIG = Codes(
    rq=Rq(num_levels=2, codebook_size=32),
    vq=Vq(top_k=5),
    suffix=Suffix(num_codes=64),
    refit=RefitPolicy(every_days=7),
)
CENTRES = np.random.default_rng(9).standard_normal((60, 16))


def vectors_of(item_ids: np.ndarray) -> np.ndarray:
    """Vectors that belong to ids: every day sees the same ones."""
    rows = []
    for item in item_ids.tolist():
        rng = np.random.default_rng(item)
        rows.append(CENTRES[item % 60] + 0.4 * rng.standard_normal(16))
    x = np.array(rows)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Week:
    """100 items are born and 100 die every day."""

    def __init__(self, root: Path, config: Codes = CONFIG) -> None:
        self.root, self.config = root, config
        self.earlier: pa.Table | None = None
        self.version: str | None = None

    def run(self, day: int, *, encoder: str = "tower-1", force: bool = False) -> Quantized:
        ids = np.arange(100 * day, 100 * day + 2000)
        x = vectors_of(ids)
        if encoder != "tower-1":
            turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((16, 16)))
            x = (x @ turn).astype(np.float32)
        last_day = f"2026-01-{day + 1:02d}"
        items = ItemVectors(ids, x, encoder, "2026-01-01", last_day, self.earlier, self.version)
        scratch = self.root / f"day-{day}"
        scratch.mkdir(parents=True)
        versions = self.root / "codebooks"
        facts = quantize(self.config, items, versions, scratch, force_refit=force)
        self.version = facts.version
        self.earlier = pq.read_table(scratch / CODES_FILE)
        return facts

    def codes(self, item_ids: np.ndarray) -> dict[str, list]:
        assert self.earlier is not None
        columns = candidate_columns(ItemCodes.of(self.earlier), item_ids)
        return {name: column.to_pylist() for name, column in columns.items()}


def test_new_items_get_codes_from_frozen_codebooks(tmp_path: Path) -> None:
    week = Week(tmp_path)
    first = week.run(0)
    kept = np.arange(100, 2000)
    before = week.codes(kept)

    second = week.run(1)

    assert first.refit.reasons == ("there are no codebooks yet",)
    assert not second.refit.refit
    assert (first.version, second.version) == ("v0001", "v0001")
    assert (first.num_new_items, second.num_new_items) == (0, 100)
    assert week.codes(kept) == before
    assert second.stability
    assert second.stability.full == 1
    books = load_version(tmp_path / "codebooks", "v0001")
    born = np.arange(2000, 2100)
    assert books.residual
    expected = books.residual.encode(vectors_of(born))
    found = week.codes(born)
    assert [found["sid_0"], found["sid_1"]] == expected.T.tolist()
    assert all(len(near) == 5 and max(near) < 2000 for near in found["vq"])
    full = full_codes(week.earlier)
    assert len(set(full)) == len(full)
    assert second.num_sharing_suffix == 0


def full_codes(table: pa.Table | None) -> list[tuple]:
    assert table is not None
    return list(zip(*(table[c].to_pylist() for c in ("sid_0", "sid_1", "sid_suffix")), strict=True))


def test_a_refit_is_published_with_its_carry_over(tmp_path: Path) -> None:
    week = Week(tmp_path)
    week.run(0)

    after = week.run(7)

    assert after.version == "v0002"
    assert "7 days old" in after.refit.reasons[0]
    assert after.drift
    assert after.drift.error_ratio == pytest.approx(1, abs=0.15)
    manifest = find_version(tmp_path / "codebooks", "v0002")
    assert manifest.parent == "v0001"
    assert manifest.share_carried["sid_0"] > 0.9
    assert after.stability
    assert after.stability.levels[0] > 0.9
    # A table whose rows spell the codes themselves goes through the refit.
    carry = carries_between(tmp_path / "codebooks", "v0001", "v0002")["vq"]
    old = torch.arange(2001.0)[:, None]
    rows = table_rows(carry, old, torch.full((after.table_sizes["vq"] + 1, 1), -1.0))
    books = load_version(tmp_path / "codebooks", "v0002")
    assert books.items
    survivors = np.flatnonzero(books.items.item_ids_N < 2000)
    assert rows[survivors + 1, 0].tolist() == (books.items.item_ids_N[survivors] + 1).tolist()


def test_carries_compose_over_several_versions(tmp_path: Path) -> None:
    week = Week(tmp_path)
    for day in range(3):
        week.run(day, force=True)
    root = tmp_path / "codebooks"

    whole = carries_between(root, "v0001", "v0003")
    steps = [carries_between(root, "v0001", "v0002"), carries_between(root, "v0002", "v0003")]

    assert carries_between(root, "v0002", "v0002") == {}
    for column in ("sid_0", "sid_1", "vq"):
        sizes = [
            find_version(root, version).table_sizes[column] + 1
            for version in ("v0001", "v0002", "v0003")
        ]
        tables = [torch.randn(size, 4) for size in sizes]
        between = table_rows(steps[0][column], tables[0], tables[1])
        expected = table_rows(steps[1][column], between, tables[2])
        assert torch.equal(table_rows(whole[column], tables[0], tables[2]), expected)
    back = carries_between(root, "v0003", "v0001")
    for column, carry in back.items():
        forth = whole[column]
        for code in np.flatnonzero(carry.carried_K).tolist():
            assert forth.source_K[carry.source_K[code]] == code
            assert forth.carried_K[carry.source_K[code]]
        assert carry.carried_K.sum() == forth.carried_K.sum() > 0


def test_a_new_encoder_goes_on_with_the_codes_of_the_items(tmp_path: Path) -> None:
    week = Week(tmp_path)
    week.run(0)
    before = week.codes(np.arange(100, 2000))

    after = week.run(1, encoder="tower-2")

    assert after.refit.reasons == ("the encoder changed from tower-1 to tower-2",)
    assert after.drift is None
    assert after.stability
    assert after.stability.levels[0] > 0.9
    now = week.codes(np.arange(100, 2000))
    assert np.mean(np.equal(now["sid_0"], before["sid_0"])) == after.stability.levels[0]
    assert now["vq_nearest"] == before["vq_nearest"]  # items keep their slots
    assert not any(own in near for own, near in zip(now["vq_nearest"], now["vq"], strict=True))


def test_renumbering_refits_have_no_parent(tmp_path: Path) -> None:
    lost = CONFIG.model_copy(update={"refit": RefitPolicy(keep_meaning=False)})
    week = Week(tmp_path, lost)
    week.run(0)
    after = week.run(1, force=True)
    assert after.refit.reasons == ("asked for",)
    assert after.stability
    assert after.stability.levels[0] < 0.5
    with pytest.raises(UserError, match="share no code numbers with v0001"):
        carries_between(tmp_path / "codebooks", "v0001", "v0002")


def test_changed_settings_call_for_new_codebooks(tmp_path: Path) -> None:
    Week(tmp_path).run(0)
    rq = Rq(num_levels=3, codebook_size=40)
    week = Week(tmp_path, CONFIG.model_copy(update={"rq": rq, "vq": None}))
    week.version = "v0001"
    after = week.run(1)
    assert "settings differ from those of codebooks v0001" in after.refit.reasons[0]
    assert after.table_sizes == {"sid_0": 40, "sid_1": 40, "sid_2": 40, "sid_suffix": 64}
    carries = carries_between(tmp_path / "codebooks", "v0001", "v0002")
    assert set(carries) == {"sid_0", "sid_1", "sid_2"}
    only_vq = Week(tmp_path, Codes(rq=None)).run(2)
    assert only_vq.metrics is None
    assert only_vq.table_sizes == {"vq": 2000}


def test_only_seen_items_are_fitted_and_all_get_codes(tmp_path: Path) -> None:
    ids = np.arange(2000)
    x, seen = vectors_of(ids), ids < 1500
    root, scratch = tmp_path / "codebooks", tmp_path / "day"
    scratch.mkdir()
    items = ItemVectors(ids, x, "tower-1", "2026-01-01", "2026-01-02", seen_N=seen)

    facts = quantize(CONFIG, items, root, scratch)

    assert (facts.num_items, facts.num_unseen_items, facts.num_new_items) == (2000, 500, 0)
    books = load_version(root, "v0001")
    assert books.fitted_ids is not None
    assert books.fitted_ids.tolist() == ids[seen].tolist()
    assert facts.table_sizes["vq"] == 1500
    assert books.residual
    codes = pq.read_table(scratch / CODES_FILE)
    expected = books.residual.encode(x)
    assert [codes["sid_0"].to_pylist(), codes["sid_1"].to_pylist()] == expected.T.tolist()


def test_too_few_seen_items_are_counted_against_all(tmp_path: Path) -> None:
    ids = np.arange(200)
    items = ItemVectors(
        ids, vectors_of(ids), "tower-1", "2026-01-01", "2026-01-02", seen_N=ids % 10 == 0
    )
    (tmp_path / "day").mkdir()
    with pytest.raises(
        UserError,
        match=r"codes\.rq\.codebook_size=32 needs at least as many items, and there are 20; set it "
        r"to 2 or less; codebooks are fitted to the 20 of 200 items with a vector that an event "
        r"has shown by 2026-01-02 and that are not held out",
    ):
        quantize(CONFIG, items, tmp_path / "codebooks", tmp_path / "day")
    assert not (tmp_path / "codebooks").exists()


def test_vectors_that_point_the_same_way_are_warned_of(tmp_path: Path) -> None:
    week = Week(tmp_path / "sound")
    sound = week.run(0)
    x = vectors_of(np.arange(2000)) + 4.0
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (np.square(units.sum(axis=0)).sum() - 2000) / (2000 * 1999)
    assert cosine > 0.98
    items = ItemVectors(np.arange(2000), x, "tower-1", "2026-01-01", "2026-01-02")
    (tmp_path / "day").mkdir()

    alike = quantize(CONFIG, items, tmp_path / "codebooks", tmp_path / "day")

    assert alike.mean_cosine == pytest.approx(cosine, abs=1e-5)
    assert alike.refit.reasons == ("there are no codebooks yet",)
    warning = collapse_warning(alike.mean_cosine)
    assert warning is not None
    assert f"item vectors hardly differ (mean cosine of two items {cosine:.4f})" in warning
    assert collapse_warning(sound.mean_cosine) is None
    assert sound.mean_cosine is not None
    assert abs(sound.mean_cosine) < 0.1
    assert sound.refit.reasons == ("there are no codebooks yet",)


def test_a_recipe_may_name_its_codebooks(tmp_path: Path) -> None:
    week = Week(tmp_path)
    week.run(0)
    week.run(1, force=True)
    week.config = CONFIG.model_copy(update={"version": "v0001"})

    pinned = week.run(20)

    assert pinned.version == "v0001"
    assert not pinned.refit.refit
    assert (
        "codes.version=v0001; otherwise: the codebooks are 20 days old" in pinned.refit.reasons[0]
    )
    with pytest.raises(UserError, match="codes.version=v0001 cannot code the items: the encoder"):
        week.run(21, encoder="tower-2")
    week.config = CONFIG.model_copy(update={"version": "v0009"})
    with pytest.raises(UserError, match="codebook version 'v0009' is not in .*v0001, v0002"):
        week.run(22)


def test_more_items_than_the_vq_table_has_rows_are_refused_before_a_fit(tmp_path: Path) -> None:
    week = Week(tmp_path, CONFIG.model_copy(update={"vq": Vq(max_items=1999)}))
    with pytest.raises(UserError, match="max_items=1999 is less than the 2000 items"):
        week.run(0)
    assert not (tmp_path / "codebooks").exists()


def test_a_table_that_has_become_too_small_stops_the_next_fit_only(tmp_path: Path) -> None:
    week = Week(tmp_path, CONFIG.model_copy(update={"vq": Vq(top_k=5, max_items=2000)}))
    week.run(0)
    ids = np.arange(100, 2200)  # 100 more than the table has rows
    items = ItemVectors(
        ids, vectors_of(ids), "tower-1", "2026-01-01", "2026-01-02", week.earlier, "v0001"
    )
    scratch = tmp_path / "many"
    scratch.mkdir()

    facts = quantize(week.config, items, tmp_path / "codebooks", scratch)

    assert (facts.version, facts.num_items) == ("v0001", 2100)
    with pytest.raises(UserError, match="max_items=2000 is less than the 2100 items"):
        quantize(week.config, items, tmp_path / "codebooks", scratch, force_refit=True)


def test_settings_that_do_not_fit_leave_no_codebooks_behind(tmp_path: Path) -> None:
    wide = CONFIG.model_copy(update={"features": CodeFeatures(vector_dims=17)})
    with pytest.raises(UserError, match="vector_dims=17 is more than the 16 elements"):
        Week(tmp_path / "wide", wide).run(0)
    assert not (tmp_path / "wide" / "codebooks").exists()
    week = Week(tmp_path)
    week.run(0)
    week.config = CONFIG.model_copy(update={"vq": Vq(top_k=5, max_items=1999)})
    ids = np.arange(100, 2000)  # fewer than that, but the slots of the others stay
    items = ItemVectors(
        ids, vectors_of(ids), "tower-1", "2026-01-01", "2026-01-02", week.earlier, "v0001"
    )
    (tmp_path / "fewer").mkdir()

    with pytest.raises(UserError, match="max_items=1999 is less than the 2000 items"):
        quantize(week.config, items, tmp_path / "codebooks", tmp_path / "fewer", force_refit=True)
    assert [path.name for path in (tmp_path / "codebooks").iterdir()] == ["v0001"]
    anew = week.config.model_copy(update={"refit": RefitPolicy(keep_meaning=False)})
    facts = quantize(anew, items, tmp_path / "codebooks", tmp_path / "fewer", force_refit=True)
    assert facts.table_sizes["vq"] == 1900


@pytest.mark.parametrize("rq", [None, CONFIG.rq])
def test_vectors_with_nan_are_named(tmp_path: Path, rq: Rq | None) -> None:
    week = Week(tmp_path, Codes(rq=rq, vq=Vq(top_k=5)))
    week.run(0)
    ids = np.arange(2000)
    x = vectors_of(ids)
    x[77, 3] = np.nan
    items = ItemVectors(ids, x, "tower-1", "2026-01-01", "2026-01-02", week.earlier, "v0001")
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match=r"item vector 77 holds NaN or infinity \(1 such rows"):
        quantize(week.config, items, tmp_path / "codebooks", tmp_path / "broken")

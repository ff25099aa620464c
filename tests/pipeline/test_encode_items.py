"""Codes that are kept, looked up in pieces, or on Ray workers are those of one look-up of all."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from embedding.errors import UserError
from multimodal.codes.config import CODES_FORMAT, CodeFeatures, Codes, EncodeWorkers, RefitPolicy
from multimodal.codes.residual_quantizer import CPU
from multimodal.codes.store import Codebooks
from multimodal.codes.versions import load_version
from pipeline.cluster import RaySession
from pipeline.codes.encode_items import (
    Books,
    CodeAssigner,
    DayEncoder,
    Encoded,
    LookUp,
    Machines,
    Piece,
)
from pipeline.codes.encode_workers import RayPieces, workers_that_fit
from pipeline.codes.features import CODES_FILE, read_codes
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.kept_codes import KeptCodes
from pipeline.codes.quantize import quantize
from pipeline.codes.quantize_facts import Quantized
from pipeline.config import ClusterConfig

SETTINGS: dict[str, Any] = {
    "rq": {"num_levels": 2, "codebook_size": 16},
    "vq": {"top_k": 4, "max_items": 2000},
    "suffix": {"num_codes": 32},
}
CODES = Codes.model_validate(SETTINGS)
IDS = np.arange(1000, 1900)
CHANGED = np.arange(150, 190)
"""Rows whose vectors are others on the second day."""


def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 12))[np.arange(900) % 30] + 0.4 * rng.standard_normal((900, 12))
    return x.astype(np.float32)


def pieces(codes: Codes, size: int, num_workers: int = 2) -> Codes:
    encode = EncodeWorkers(items_per_task=size, num_workers=num_workers)
    return codes.model_copy(update={"encode": encode})


def run_here(
    todo: Iterator[Piece], sizes: Sequence[int], look_up: LookUp, _: EncodeWorkers
) -> Iterator[tuple[int, Encoded]]:
    """Workers in this process: each piece by one of its own, the last one first."""
    found = list(enumerate(todo))
    assert [len(piece.own_B) for _, piece in found] == [*sizes]
    assert len(sizes) > 1
    for at, piece in reversed(found):
        yield at, CodeAssigner.load(look_up, CPU)(piece)


class Days:
    """Two days: on the second one 100 items are gone, 100 are new, and 40 have other vectors."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.day(0, "first", CODES)

    def items(self, day: int) -> ItemVectors:
        x = vectors()
        if not day:
            return ItemVectors(IDS[:800], x[:800], "tower", "2026-01-01", "2026-01-01")
        x[CHANGED] = x[CHANGED[::-1]]
        first = self.root / "first"
        return ItemVectors(
            IDS[100:],
            x[100:],
            "tower",
            "2026-01-01",
            "2026-01-02",
            pq.read_table(first / CODES_FILE),
            "v0001",
            kept=KeptCodes.read(first),
        )

    def day(
        self, day: int, name: str, codes: Codes, machines: Machines | None = None, **changes: Any
    ) -> Quantized:
        scratch = self.root / name
        scratch.mkdir()
        force = changes.pop("force_refit", False)
        items = replace(self.items(day), **changes)
        machines = machines or Machines()
        return quantize(
            codes, items, self.root / "codebooks", scratch, force_refit=force, machines=machines
        )

    def table(self, name: str) -> dict[str, list]:
        return pq.read_table(self.root / name / CODES_FILE).to_pydict()


@pytest.fixture
def days(tmp_path: Path) -> Days:
    return Days(tmp_path)


def test_only_new_and_changed_items_are_looked_up(days: Days) -> None:
    daily = days.day(1, "daily", CODES)
    whole = days.day(1, "whole", CODES, kept=None)

    assert (daily.num_encoded, whole.num_encoded) == (140, 800)
    assert days.table("daily") == days.table("whole")
    assert daily.model_copy(update={"num_encoded": 800}) == whole


def test_a_changed_vector_has_the_codes_of_the_new_one(days: Days) -> None:
    nudged = np.array(days.items(1).vectors_ND)
    nudged[7, 3] = np.nextafter(nudged[7, 3], np.float32(9))  # the smallest change there is

    daily = days.day(1, "daily", CODES, vectors_ND=nudged)
    days.day(1, "whole", CODES, vectors_ND=nudged, kept=None)

    assert daily.num_encoded == 141
    assert days.table("daily") == days.table("whole")
    before = {i: row for i, *row in zip(*(days.table("first")[c] for c in COLUMNS), strict=True)}
    after = {i: row for i, *row in zip(*(days.table("daily")[c] for c in COLUMNS), strict=True)}
    differing = {item for item, row in after.items() if item in before and before[item] != row}
    assert differing <= {*IDS[CHANGED], IDS[107]}
    assert len(differing) > len(CHANGED) // 2


COLUMNS = ("item_id", "sid_0", "sid_1", "vq")


def test_other_codebooks_and_other_look_ups_keep_nothing(days: Days) -> None:
    refitted = days.day(1, "refitted", CODES, force_refit=True)
    assert (refitted.version, refitted.num_encoded) == ("v0002", 800)
    longer = Codes.model_validate({**SETTINGS, "vq": {"top_k": 6, "max_items": 2000}})
    facts = days.day(1, "longer", longer)
    assert facts.version == "v0001"
    assert facts.num_encoded == 800  # RQ codes are kept, VQ codes are others
    days.day(1, "all", longer, kept=None)
    assert days.table("longer") == days.table("all")
    # The day after a refit keeps what the refit gave.
    items = days.items(1)
    kept = KeptCodes.read(days.root / "refitted")
    after = days.day(1, "after", CODES, version="v0002", kept=kept)
    assert (after.num_encoded, items.version) == (0, "v0001")
    assert {c: days.table("after")[c] for c in COLUMNS} == {
        c: days.table("refitted")[c] for c in COLUMNS
    }


def test_codes_of_another_format_are_not_kept(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.codes.kept_codes.CODES_FORMAT", CODES_FORMAT + 1)
    assert days.day(1, "daily", CODES).num_encoded == 800


def test_of_the_day_before_only_ids_and_codes_are_read(days: Days) -> None:
    with_vectors = CODES.model_copy(update={"features": CodeFeatures(vector_dims=3)})
    days.day(0, "dense", with_vectors)
    kept = KeptCodes.read(days.root / "dense")
    assert kept is not None
    assert set(days.table("dense")) - set(kept.codes.column_names) == {*("vector", "vq_nearest")}
    ids_and_codes = read_codes(days.root / "dense")
    assert ids_and_codes == kept.codes.drop_columns(["vq"])
    assert ids_and_codes.column_names == ["item_id", "sid_0", "sid_1", "sid_suffix"]


def test_artifacts_without_digests_are_looked_up_whole(days: Days) -> None:
    (days.root / "first" / "digests.parquet").unlink()
    assert KeptCodes.read(days.root / "first") is None
    assert days.day(1, "daily", CODES).num_encoded == 800


@pytest.mark.parametrize("index", ["exact", "hnsw", "ivf"])
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("size", [97, 799])
def test_pieces_make_no_difference(days: Days, index: str, in_file: bool, size: int) -> None:
    vq = {"top_k": 4, "max_items": 2000, "index": {"kind": index}}
    codes = Codes.model_validate({**SETTINGS, "vq": vq})
    file = days.root / "vectors.npy"
    np.save(file, days.items(1).vectors_ND)

    changes = {"kept": None, "file": file if in_file else None}
    days.day(1, "pieces", pieces(codes, size), Machines(run_here), **changes)
    days.day(1, "one", codes, kept=None)

    assert days.table("pieces") == days.table("one")
    assert sorted(path.name for path in (days.root / "pieces").iterdir()) == [
        *(CODES_FILE, "digests.parquet")
    ]
    refitted = [
        days.day(1, name, some, machines, force_refit=True, **changes)
        for name, some, machines in (
            ("refit-pieces", pieces(codes, size), Machines(run_here)),
            ("refit-one", codes, Machines()),
        )
    ]
    assert [facts.version for facts in refitted] == ["v0002", "v0003"]
    assert days.table("refit-pieces") == days.table("refit-one")
    assert refitted[0].metrics == refitted[1].metrics


def test_a_few_items_stay_here(days: Days) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("no worker is needed")

    assert days.day(1, "daily", pieces(CODES, 140), Machines(refuse)).num_encoded == 140


def test_where_codes_are_looked_up_is_not_part_of_what_they_are() -> None:
    assert pieces(CODES, 5).quantized == CODES.quantized
    assert pieces(CODES, 5).shared == CODES.shared
    other = CODES.model_copy(update={"refit": RefitPolicy(every_days=3)})
    assert other.quantized != CODES.quantized


def test_a_cluster_without_room_is_refused() -> None:
    config = EncodeWorkers(num_workers=5, cpus_per_worker=2, gpus_per_worker=0.5)
    assert workers_that_fit([{"CPU": 16.0, "GPU": 1.0}], config) == 2
    assert workers_that_fit([{"CPU": 7.0, "GPU": 8.0}], config) == 3
    assert workers_that_fit([{"CPU": 70.0, "GPU": 8.0}], config) == 5
    # A worker is on one node: three CPUs on each of two are room for one each.
    assert workers_that_fit([{"CPU": 3.0, "GPU": 4.0}, {"CPU": 3.0, "GPU": 4.0}], config) == 2
    tenths = EncodeWorkers(num_workers=20, cpus_per_worker=1, gpus_per_worker=0.1)
    assert workers_that_fit([{"CPU": 32.0, "GPU": 1.0}], tenths) == 10
    with pytest.raises(UserError, match=r"gpus_per_worker=0.5 fits on no .* 64 CPUs and 0 GPUs"):
        workers_that_fit([{"CPU": 64.0}, {"CPU": 1.0}], config)


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_ray_workers_give_the_codes_of_the_driver(days: Days) -> None:
    done: list[tuple[int, int]] = []
    file = days.root / "vectors.npy"
    np.save(file, days.items(1).vectors_ND)
    days.day(1, "driver", CODES, kept=None)
    session = RaySession(ClusterConfig(num_workers=1))
    run = RayPieces(session, lambda *counts: done.append(counts))
    for name, where, workers in (("memory", None, 1), ("file", file, 2)):
        codes = pieces(CODES, 150, workers)
        days.day(1, name, codes, Machines(run), kept=None, file=where)
        assert days.table(name) == days.table("driver")
    # RQ, then VQ, in 6 pieces each, in the order in which they came.
    assert len(done) == 4 * 6
    assert [counts for counts in done if counts[0] == 800] == [(800, 800)] * 4
    # What a worker says is wrong arrives as a sentence, and no worker is left.
    broken = np.zeros((800, 7), np.float32)
    np.save(file, broken)
    with pytest.raises(UserError, match="were fitted to vectors of 12 dimensions, these have"):
        days.day(1, "broken", pieces(CODES, 150, 1), Machines(run), kept=None, file=file)
    few = pieces(CODES, 150).encode.model_copy(update={"gpus_per_worker": 1.0})
    codes = CODES.model_copy(update={"encode": few})
    if not ray.cluster_resources().get("GPU"):
        with pytest.raises(UserError, match=r"codes.encode: a worker with cpus_per_worker=1"):
            days.day(1, "no-gpu", codes, Machines(run), kept=None)


def test_a_worker_names_damaged_codebooks(days: Days) -> None:
    books = load_version(days.root / "codebooks", "v0001")
    damaged = days.root / "codebooks" / "v0001" / "codebooks.safetensors"
    damaged.unlink()  # the codebooks here are mapped from it
    damaged.write_bytes(b"nothing")
    (days.root / "scratch").mkdir()
    encoder = DayEncoder(
        pieces(CODES, 300), days.items(1), days.root / "scratch", Machines(run_here)
    )
    with pytest.raises(UserError, match="cannot be read as codebooks"):
        encoder.encode(Books(books, "another", damaged.parent))
    assert not [*(days.root / "scratch").iterdir()]
    assert isinstance(books, Codebooks)

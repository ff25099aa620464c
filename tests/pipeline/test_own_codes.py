"""Codes that the runs of an output directory make: codebooks that they do not go on with."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from embedding.errors import UserError
from multimodal.codes.versions import are_related, load_version, named_version
from pipeline.artifacts import read_manifest
from pipeline.cluster import RaySession
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.codes.quantize_stage import codes_of_day
from pipeline.config import HeldOutItems, Recipe
from pipeline.console import Reporter
from pipeline.days import Split
from pipeline.samples.held_out import is_held_out
from pipeline.stages import execute
from tests.pipeline.small_log import make_recipe

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
IDS = np.arange(1, 91)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output directory whose events have shown all items by every day."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, 6))[IDS % 9] + 0.3 * rng.standard_normal((len(IDS), 6))
    (tmp_path / "data").mkdir()
    items = pa.table({"item_id": IDS, "vec": x.astype(np.float32).tolist()})
    pq.write_table(items, tmp_path / "data" / "items.parquet")
    for day in DAYS:
        ingest = tmp_path / "runs" / day / "ingest"
        ingest.mkdir(parents=True)
        pq.write_table(pa.table({"item_id": IDS}), ingest / "item_counts.parquet")
    return tmp_path / "runs"


def run(out: Path, day: int, held_out: dict[str, Any] | None, **codes: Any) -> tuple[str, str]:
    """The codebooks of a day, and what is said of them."""
    parts = {
        "vectors": {"kind": "column", "column": "vec"},
        "rq": {"num_levels": 2, "codebook_size": 4},
        "vq": {"top_k": 3, "max_items": 100},
    }
    recipe = Recipe.model_validate(
        {
            **make_recipe(out.parent / "data").model_dump(mode="json"),
            "codes": parts | codes,
            "evaluation": {"held_out_items": held_out},
            "window": {"warm_start": held_out is None},
        }
    )
    console = Console(width=400, record=True, quiet=False, file=(out / "said").open("w"))
    split = Split(DAYS[: day + 1], DAYS[: day + 1], (), ("2026-01-09",))
    found = codes_of_day(recipe, out, split, RaySession(recipe.cluster), Reporter(console))
    assert found is not None
    (spec,) = found.specs("quantize", "catalogue", (), None)
    execute(spec, found.reporter)
    return facts(out, day).version, console.export_text()


def facts(out: Path, day: int) -> QuantizeFacts:
    manifest = read_manifest(out / DAYS[day] / "quantize", QuantizeFacts)
    assert manifest is not None
    return manifest.facts


def known(out: Path, version: str, config: HeldOutItems) -> int:
    fitted_ids = load_version(out / "codebooks", version).fitted_ids
    assert fitted_ids is not None
    return int(is_held_out(fitted_ids, config).sum())


def test_codebooks_that_know_held_out_items_are_not_gone_on_with(out: Path) -> None:
    held_out = HeldOutItems(share=0.3)
    assert run(out, 0, None)[0] == "v0001"
    assert run(out, 1, None)[0] == "v0001"
    assert known(out, "v0001", held_out) == is_held_out(IDS, held_out).sum() > 0

    # A day that has gone on with them before, and one that has not run yet.
    version, said = run(out, 1, {"share": 0.3})
    assert (version, facts(out, 1).previous) == ("v0002", None)
    assert f"v0001 were fitted to 90 items, {known(out, 'v0001', held_out)} of them held" in said
    assert "codes of 2026-01-01 are not gone on with" in said
    assert known(out, "v0002", held_out) == 0
    version, said = run(out, 2, {"share": 0.3})
    assert (version, facts(out, 2).previous, facts(out, 2).refit.refit) == ("v0002", DAYS[1], False)
    assert "held out" not in said

    # Fewer of the same items are no others; with another seed they are.
    assert run(out, 2, {"share": 0.2})[0] == "v0002"
    assert run(out, 2, {"share": 0.3, "seed": 1})[0] == "v0003"
    assert known(out, "v0003", HeldOutItems(share=0.3, seed=1)) == 0


def test_a_recipe_names_no_codebooks_that_know_held_out_items(out: Path) -> None:
    run(out, 0, None)
    run(out, 1, None, refit={"force_on": [DAYS[1]]})
    count = known(out, "v0001", HeldOutItems(share=0.3))
    for version, which in (("v0001", "v0001"), ("v0002", "v0002")):
        with pytest.raises(
            UserError,
            match=rf"codes.version={version}: codebooks {which} were fitted to 90 items, {count} of"
            r" them held out here .*share=0.3, seed=0\); leave codes.version out",
        ):
            run(out, 2, {"share": 0.3}, version=version)
    run(out, 0, {"share": 0.3})
    run(out, 1, {"share": 0.3}, refit={"force_on": [DAYS[1]]})
    assert run(out, 2, {"share": 0.3}, version="v0003")[0] == "v0003"
    assert run(out, 2, None, version="v0001")[0] == "v0001"


def test_what_the_message_says_helps_with_damaged_codebooks(out: Path) -> None:
    root = out / "codebooks"
    run(out, 0, None)
    trained_with = facts(out, 0).codebooks
    (root / "v0001" / "codebooks.safetensors").write_bytes(b"no tensors")
    remedy = "delete OUT/DATE/quantize of all runs whose codes are of v0001 or of versions that go"
    with pytest.raises(UserError, match=f"cannot be read as codebooks .*{remedy}"):
        run(out, 1, None)
    shutil.rmtree(out / DAYS[0] / "quantize")
    assert run(out, 1, None)[0] == "v0002"
    # A model of before may be gone on with: its code tables start anew.
    assert named_version(root, trained_with) == "v0001"
    assert not are_related(root, "v0001", "v0002")

    trained_with = facts(out, 1).codebooks
    (root / "v0002" / "manifest.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is no codebook manifest .*\(remove .*v0002, too, and set"
    ):
        run(out, 2, None)
    shutil.rmtree(root / "v0002")
    with pytest.raises(UserError, match=r"'v0002' is not in .*there are: v0001.*of v0002 or of"):
        run(out, 2, None)
    with pytest.raises(UserError, match=r"v0002 is gone, .*window.warm_start=false"):
        named_version(root, trained_with)
    shutil.rmtree(out / DAYS[1] / "quantize")
    assert run(out, 2, None)[0] == "v0002"

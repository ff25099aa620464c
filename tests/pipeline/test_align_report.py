"""What the report says about item vectors, from artifacts written by hand."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedding.raw_ids import to_raw_ids
from pipeline.artifacts import Manifest, publish
from pipeline.codes.align_facts import AlignFacts, AlignmentResult, PairFacts
from pipeline.codes.align_report import align_section
from pipeline.config import Recipe
from pipeline.content.facts import ContentFacts
from pipeline.reports.page import render
from tests.pipeline.small_log import make_recipe

NAMES = [f"i{i}" for i in range(6)]
IDS = to_raw_ids(pa.array(NAMES)).to_pylist()
PAIRS = PairFacts(
    first_day="2024-01-01",
    last_day="2024-01-02",
    num_positives=1234,
    num_users=90,
    num_cut_users=7,
    num_cut_items=3,
    item2item_pairs=4321,
    item2item_items=55,
    user2item_pairs=777,
    user2item_without={"target_without_vector": 400, "no_earlier_positive": 57},
    id_space="factorisation",
    examples=((IDS[0], IDS[1], 0.9),),
    samples={
        "item2item": ((IDS[0], IDS[1], 0.9), (IDS[2], IDS[3], 0.125)),
        "user2item": ((IDS[4], IDS[5], -0.25),),
    },
)
TRAINING = AlignmentResult(
    steps=12,
    first_loss=4.5,
    last_loss=2.25,
    temperature=0.07,
    seconds=3.0,
    num_pairs={"item2item": 4000, "user2item": 700},
)


def write_titles(root: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (90, 60)).save(picture, "PNG")
    columns = {
        "item_id": NAMES,
        "title": [f"Film {name}" for name in NAMES],
        "poster": [picture.getvalue() if i % 2 else None for i in range(len(NAMES))],
    }
    pq.write_table(pa.table(columns), root / "items.parquet")


def recipe(root: Path, kind: str) -> Recipe:
    content = {"text": {"model": "tiny"}, "image": {"model": "tiny", "column": "poster"}}
    vectors: dict[str, Any] = {"kind": kind}
    if kind == "column":
        vectors |= {"column": "vec", "encoder": "mine"}
    else:
        vectors |= {"content": content}
    codes = {"vectors": vectors, "rq": {"codebook_size": 4}}
    if kind == "aligned":
        vectors["swing"] = {"max_items_per_user": 150, "max_users_per_item": 250}
    return Recipe.model_validate({**make_recipe(root).model_dump(mode="json"), "codes": codes})


def write_run(out: Path, day: str, *, previous: str | None, encoder: str, **facts: Any) -> Path:
    scratch, directory = out / f"scratch-{day}", out / day / "align"
    scratch.mkdir(parents=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    written = AlignFacts(
        encoder=encoder,
        trained_on="2024-01-02",
        num_items=60,
        num_without_content=2,
        num_encoded=5,
        pairs=facts.get("pairs"),
        training=facts.get("training"),
        content=ContentFacts(num_items=62, num_without_content=2, modalities={}),
        settings="s",
        previous=previous,
    )
    manifest = Manifest(stage="align", artifact_id=day, config_hash="c", facts=written)
    publish(scratch, directory, manifest)
    return out / day


def page(section: dict[str, Any] | None) -> str:
    return render("align.html.j2", align=section)


def test_a_later_run_shows_the_pairs_that_its_encoder_was_trained_on(tmp_path: Path) -> None:
    write_titles(tmp_path)
    settings, out = recipe(tmp_path, "aligned"), tmp_path / "runs"
    write_run(out, "2024-01-02", previous=None, encoder="e", pairs=PAIRS, training=TRAINING)
    write_run(out, "2024-01-03", previous="2024-01-02", encoder="e")
    last = write_run(out, "2024-01-04", previous="2024-01-03", encoder="e")

    section = align_section(settings, last)

    assert section is not None
    shown = [
        [(pair.first.title, pair.second.title, pair.similarity) for pair in source.pairs]
        for source in section["samples"]
    ]
    assert shown == [
        [("Film i0", "Film i1", "0.9"), ("Film i2", "Film i3", "0.125")],
        [("Film i4", "Film i5", "-0.25")],
    ]
    pair = section["samples"][0].pairs[0]
    assert pair.first.picture is None
    assert str(pair.second.picture).startswith("data:image/jpeg")
    html = " ".join(page(section).split())
    for said in (
        "aligned in the run of 2024-01-02 on pairs of 2024-01-01 .. 2024-01-02",
        "loss 4.500 -&gt; 2.250",
        '<td>item2item</td><td class="n">4,321</td><td class="n">4,000</td>',
        '<td>user2item</td><td class="n">777</td><td class="n">700</td>',
        "of 1,234 positives; 400 without (its item has no ID vector yet)",
        "7 of 90 users have more than 150 items",
        "3 items have more than 250 users",
        "alike by a factorisation of the positives",
    ):
        assert said in html, said
    assert html.count("<img") == 3


def test_pairs_of_another_encoder_are_not_shown(tmp_path: Path) -> None:
    """The run that trained was made again since: its encoder is another one now."""
    write_titles(tmp_path)
    settings, out = recipe(tmp_path, "aligned"), tmp_path / "runs"
    write_run(out, "2024-01-02", previous=None, encoder="new", pairs=PAIRS, training=TRAINING)
    last = write_run(out, "2024-01-03", previous="2024-01-02", encoder="old")

    html = page(align_section(settings, last))

    assert "that run is gone" in html
    assert "item2item" not in html


def test_a_source_without_pairs_has_a_row_and_no_examples(tmp_path: Path) -> None:
    write_titles(tmp_path)
    samples = {**PAIRS.samples, "item2item": ()}
    pairs = PAIRS.model_copy(update={"item2item_pairs": 0, "samples": samples})
    trained = TRAINING.model_copy(update={"num_pairs": {"user2item": 700}})
    out, settings = tmp_path / "runs", recipe(tmp_path, "aligned")
    run = write_run(out, "2024-01-02", previous=None, encoder="e", pairs=pairs, training=trained)
    html = page(align_section(settings, run))
    assert '<td>item2item</td><td class="n">0</td><td class="n">0</td>' in html
    assert "<h3>User2Item" in html
    assert "<h3>Item2Item" not in html


def test_artifacts_of_before_samples_were_kept_show_counts_only(tmp_path: Path) -> None:
    before = PairFacts.model_validate(PAIRS.model_dump(exclude={"samples"}))
    trained = AlignmentResult.model_validate(TRAINING.model_dump(exclude={"num_pairs"}))
    out, settings = tmp_path / "runs", recipe(tmp_path, "aligned")
    run = write_run(out, "2024-01-02", previous=None, encoder="e", pairs=before, training=trained)
    html = page(align_section(settings, run))
    assert "4,321" in html
    assert "in this run" in html
    assert "Some pairs" not in html


def test_other_sources_of_vectors_have_no_pairs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "2024-01-02", previous=None, encoder="e")
    towers = page(align_section(recipe(tmp_path, "towers"), run))
    assert "mean tokens of frozen towers, 60 items, 5 of them encoded in this run, 2 without" in (
        " ".join(towers.split())
    )
    column = page(align_section(recipe(tmp_path, "column"), tmp_path / "nowhere"))
    assert "Item vectors are the column vec of items.parquet (encoder mine)" in column
    for html in (towers, column):
        assert "no pairs are mined" in html
        assert "<table" not in html
    assert align_section(make_recipe(tmp_path), run) is None

"""Alignment through the command line: trained once, kept, taken further, and its vectors coded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from deploy.app import main
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from pipeline.codes.align import same_towers
from tests.one_process import in_one_process

pytestmark = pytest.mark.integration

NUM_ITEMS, NO_TEXT, EDITED = 40, 7, 11
CODES = {
    "vectors": {
        "kind": "aligned",
        "content": {
            **{"text": {"model": "tiny", "max_tokens": 8}, "dim": 8, "fusion": {"kind": "concat"}},
            "cic": None,
        },
        **{"num_steps": 12, "warm_steps": 4, "batch_size": 64, "items_per_chunk": 16},
        "learn_temperature": True,
        "swing": {"min_common_users": 2},
    },
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"top_k": 3, "max_items": 80},
}


@dataclass(frozen=True)
class Days:
    """Three days up to their codes; a text changes before the second, the third aligns anew.

    The first is aligned by two ranks on Ray. The second is a whole run, with a ranker and a report.
    """

    folder: Path

    def facts(self, day: int, stage: str) -> dict[str, Any]:
        path = self.folder / "runs" / DAYS[day] / stage / "manifest.json"
        return json.loads(path.read_text())["facts"]

    def vectors(self, day: int) -> dict[int, np.ndarray]:
        folder = self.folder / "runs" / DAYS[day] / "align"
        ids, x = np.load(folder / "item_ids.npy"), np.load(folder / "vectors.npy")
        return dict(zip(ids.tolist(), x, strict=True))

    def run(self, day: int, *overrides: str, stage: str | None = "quantize") -> int:
        """A stage of a day, or all of them."""
        sets = [part for override in overrides for part in ("--set", override)]
        recipe = ["--recipe", str(self.folder / "coded.yaml"), "--date", DAYS[day]]
        command = ["run"] if stage is None else ["stage", stage]
        return main([*command, *recipe, "--out", str(self.folder / "runs"), *sets])


def write_texts(root: Path, *, edited: bool) -> None:
    items = pq.read_table(root / "items.parquet").select(["item_id", "category", "tags", "weight"])
    texts = [f"kind {i % 5} word {i % 3} item {i}" for i in range(1, NUM_ITEMS + 1)]
    texts[NO_TEXT - 1] = None
    if edited:
        texts[EDITED - 1] = "something else"
    pq.write_table(items.append_column("text", pa.array(texts)), root / "items.parquet")


@pytest.fixture(scope="module")
def days(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Days:
    days = Days(tmp_path_factory.mktemp("align"))
    root = days.folder / "data"
    write_catalogue(root, num_items=NUM_ITEMS, num_users=9)
    write_texts(root, edited=False)
    for i in range(4):
        # Users like items of one kind, so these are watched together.
        rows = [
            event(i, 1 + k % 9, 60 * k + 1, item_id=1 + (5 * (k * k + i) + k % 9) % NUM_ITEMS)
            for k in range(180)
        ]
        # Without these there is no AUC, and a ranker that the gate refuses is nobody's parent.
        rows += [
            event(i, 1 + k % 9, 60 * k + 31, item_id=1 + 7 * k % NUM_ITEMS, click=0)
            for k in range(40)
        ]
        write_day(root, i, [rows])
    recipe = make_recipe(root).model_dump(mode="json")
    recipe["codes"] = CODES
    recipe["cluster"]["num_workers"] = 1
    recipe["gate"] |= {"min_auc": 0.0, "calibration": [0.01, 100.0]}
    (days.folder / "coded.yaml").write_text(yaml.safe_dump(recipe))
    assert days.run(0, "cluster.num_workers=2") == 0
    write_texts(root, edited=True)
    with in_one_process():
        assert days.run(1, stage=None) == 0
        assert days.run(2, "codes.vectors.realign_every_days=1") == 0
    return days


def test_the_first_day_trains_on_its_pairs_and_encodes_all(days: Days) -> None:
    facts = days.facts(0, "align")
    assert facts["trained_on"] == DAYS[0]
    assert facts["training"]["steps"] == 12
    assert facts["training"]["last_loss"] < facts["training"]["first_loss"]
    assert facts["pairs"]["user2item_pairs"] > 0
    assert facts["pairs"]["id_space"] == "factorisation"
    assert facts["pairs"]["last_day"] == DAYS[0]
    counts = (facts["num_items"], facts["num_without_content"], facts["num_encoded"])
    assert counts == (NUM_ITEMS - 1, 1, NUM_ITEMS - 1)
    found = days.vectors(0)
    assert set(found) == {*range(1, NUM_ITEMS + 1)} - {NO_TEXT}
    np.testing.assert_allclose([np.linalg.norm(x) for x in found.values()], 1, rtol=1e-5)


def test_items_keep_their_vectors_until_their_content_changes(days: Days) -> None:
    facts = days.facts(1, "align")
    assert (facts["trained_on"], facts["training"]) == (DAYS[0], None)
    assert facts["encoder"] == days.facts(0, "align")["encoder"]
    assert facts["num_encoded"] == 1
    before, after = days.vectors(0), days.vectors(1)
    changed = [item for item in before if not np.array_equal(before[item], after[item])]
    assert changed == [EDITED]
    assert days.facts(1, "quantize")["version"] == "v0001"


def test_the_report_of_a_later_run_shows_the_pairs(days: Days) -> None:
    pairs = days.facts(0, "align")["pairs"]
    kinds = {"item2item": ("item", "neighbour"), "user2item": ("trigger", "target")}
    assert set(pairs["samples"]) == set(kinds)
    for source, columns in kinds.items():
        folder = days.folder / "runs" / DAYS[0] / "align" / "pairs" / source
        files = [pq.read_table(file, columns=[*columns]) for file in folder.glob("*.parquet")]
        mined = {(r[columns[0]], r[columns[1]]) for t in files for r in t.to_pylist()}
        sample = [tuple(pair[:2]) for pair in pairs["samples"][source]]
        assert len(sample) == min(6, len({frozenset(pair) for pair in mined}))
        assert set(sample) <= mined
    page = (days.folder / "runs" / DAYS[1] / "report.html").read_text()
    section = page.partition("<h2>Item vectors</h2>")[2].partition("</section>")[0]
    assert f"aligned in the run of {DAYS[0]}" in section
    trained = days.facts(0, "align")["training"]["num_pairs"]
    for source in kinds:
        counts = (pairs[f"{source}_pairs"], trained.get(source, 0))
        cells = "".join(f'<td class="n">{count:,}</td>' for count in counts)
        assert f"<td>{source}</td>{cells}" in section
    first, second, _ = pairs["samples"]["user2item"][0]
    titles = {i: f"kind {i % 5} word {i % 3} item {i}" for i in (first, second)}
    titles |= {NO_TEXT: f"item {NO_TEXT}", EDITED: "something else"}
    assert f"<figure>{titles[first]}</figure><figure>{titles[second]}</figure>" in section


def test_a_training_that_diverges_is_refused(
    days: Days, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    tiny = ["codes.vectors.temperature=1.0e-45", "codes.vectors.learn_temperature=false"]
    with in_one_process():
        assert days.run(0, *tiny) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "codes.vectors: the alignment loss is nan at step 1, so its vectors would" in said
    assert days.facts(0, "align")["training"]["steps"] == 12, "the artifact of before is there"


def test_a_new_encoder_moves_all_vectors_and_codes_go_on(days: Days) -> None:
    facts = days.facts(2, "align")
    assert facts["trained_on"] == DAYS[2]
    assert facts["training"]["steps"] == 4
    assert facts["pairs"]["item2item_pairs"] > 0
    assert facts["pairs"]["user2item_pairs"] > 0
    assert facts["pairs"]["id_space"] == "ranker"
    path = days.folder / "runs" / DAYS[2] / "align" / "manifest.json"
    trained = days.folder / "runs" / DAYS[1] / "train" / "manifest.json"
    inputs = json.loads(path.read_text())["inputs"]
    assert inputs["ranker"] == json.loads(trained.read_text())["artifact_id"]
    assert facts["encoder"] != days.facts(1, "align")["encoder"]
    assert facts["num_encoded"] == NUM_ITEMS - 1
    quantized = days.facts(2, "quantize")
    assert quantized["version"] == "v0002"
    assert quantized["refit"]["reasons"][0].startswith("the encoder changed from aligned:")
    assert quantized["stability"]["levels"][0] > 0.5


def test_a_learned_temperature_goes_on_where_it_was(days: Days) -> None:
    files = [days.folder / "runs" / DAYS[i] / "align" / "encoder.safetensors" for i in range(3)]
    saved = [float(load_file(file)["temperature"]) for file in files]
    assert saved[1] == saved[0]  # the second day trained nothing
    trained = [days.facts(day, "align")["training"]["temperature"] for day in (0, 2)]
    np.testing.assert_allclose([saved[0], saved[2]], trained, rtol=1e-6)
    # AdamW moves the logarithm by its rate at most: 1e-3 that falls to nothing over 4 steps.
    furthest = 1e-3 * (1 + 0.75 + 0.5 + 0.25) * 1.01
    assert abs(np.log(saved[2] / saved[0])) < furthest
    assert abs(np.log(saved[0] / 0.07)) > 2 * furthest, "else the first temperature is as near"


def test_pairs_that_are_not_there_are_named(days: Days, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    nothing = ["codes.vectors.swing.min_common_users=99", "codes.vectors.user2item=null"]
    with in_one_process():
        assert days.run(0, *nothing) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "give no pair of items to align (item2item pairs need 99 common users)" in said


def test_equal_settings_with_other_weights_are_other_towers(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "same", "other")]
    for folder, fingerprint in zip(folders, ("a", "a", "b"), strict=True):
        folder.mkdir()
        text = StoredModality(
            store=f"text-{fingerprint}",
            fingerprint=fingerprint,
            precision="float16",
            hidden_size=8,
            parts=(),
        )
        stored = StoredContent(num_items=0, modalities={"text": text})
        nothing = np.empty(0, np.int64)
        write_index(folder, nothing, stored, {"text": Places(nothing, nothing, nothing)})
    first, same, other = folders
    assert same_towers(first, same)
    assert not same_towers(first, other)

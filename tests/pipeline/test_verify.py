"""Everything in an output directory is read, and what differs is named with the remedy."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_log import make_recipe

from multimodal.codes.config import Codes, Rq
from multimodal.codes.match import fresh
from multimodal.codes.residual_quantizer import ResidualCodebooks
from multimodal.codes.store import Codebooks
from multimodal.codes.versions import CodebookManifest, publish_version
from multimodal.token_store import PartTokens, TokenStore
from pipeline import verify as verify_module
from pipeline.artifacts import Manifest, StageFacts, damaged_files, publish, writing
from pipeline.codes.paths import codebook_versions
from pipeline.content.stage import STORES
from pipeline.recipe import write_recipe
from pipeline.registry import promote
from pipeline.verify import verify
from tests.pipeline import stage_facts

DATE = "2024-01-01"


NO_FACTS = StageFacts()


def write_artifact(out: Path, stage: str, facts: StageFacts = NO_FACTS) -> Path:
    directory = out / DATE / stage
    with writing(directory, "i") as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_bytes(b"weights of " + stage.encode())
        inputs = {"train": "train"} if stage == "publish" else {}
        manifest = Manifest(
            stage=stage, artifact_id=stage, config_hash="", inputs=inputs, facts=facts
        )
        publish(scratch, directory, manifest)
    return directory


def write_log(out: Path, days: list[str]) -> Path:
    """An event log that has these days, and a run of `DATE` that read it."""
    root = out / "data"
    for day in days:
        (root / "events" / f"dt={day}").mkdir(parents=True)
    (out / DATE).mkdir(parents=True, exist_ok=True)
    write_recipe(make_recipe(root), out / DATE)
    return root


def write_part(out: Path) -> Path:
    store = TokenStore(out / STORES / "text-f", "f", "float32")
    tokens, lengths = torch.ones(2, 3, 4), torch.tensor([3, 2])
    ids = np.arange(2)
    name = store.append(PartTokens(ids, ids, [None, None], tokens, lengths, [False, False]))
    store.check([name])
    return store.directory / f"{name}.safetensors"


def damage(path: Path) -> None:
    """Another last byte; size and time of change as they were."""
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_damage_of_artifacts_bundles_and_stored_tokens_is_found(tmp_path: Path) -> None:
    train = write_artifact(tmp_path, "train")
    published = write_artifact(tmp_path, "publish", stage_facts.published(DATE))
    promote(tmp_path, DATE)
    part = write_part(tmp_path)
    write_log(tmp_path, [DATE])
    told: list[tuple[int, int]] = []
    assert verify(tmp_path, lambda done, total: told.append((done, total))) == []
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    damage(published / "bundle" / "weights")
    (train / "bundle" / "weights").unlink()
    damage(part)
    found = verify(tmp_path, lambda *_: None)

    # A promoted bundle is the published one under a second name.
    kept = tmp_path / "models" / "publish"
    assert [sentence.split(" ")[0] for sentence in found] == [
        str(published / "bundle" / "weights"),
        str(train / "bundle" / "weights"),
        str(kept / "bundle" / "weights"),
        str(part),
    ]
    assert f"delete {train}, and the next run writes it again" in found[1]
    assert f"restore {kept}, or promote another date; do not delete it" in found[2]
    assert f"delete {part.stem}.* there" in found[3]


def test_what_no_run_can_write_again_is_not_to_be_deleted(tmp_path: Path) -> None:
    """Once ingested, days may be deleted from the event log: their span is then the only copy."""
    before = "2023-12-31"
    ingest = write_artifact(tmp_path, "ingest", stage_facts.ingested([before, DATE]))
    train = write_artifact(tmp_path, "train")
    root = write_log(tmp_path, [before, DATE])
    for directory in (ingest, train):
        damage(directory / "bundle" / "weights")
    assert [s.split("; ")[1] for s in verify(tmp_path, lambda *_: None)] == [
        f"delete {directory}, and the next run writes it again" for directory in (ingest, train)
    ]

    (root / "events" / f"dt={before}").rmdir()
    of_ingest, of_train = verify(tmp_path, lambda *_: None)
    assert (
        f"restore {ingest} from a copy, and do not delete it: the event log no longer" in of_ingest
    )
    assert before in of_ingest
    assert f"delete {train}" in of_train

    (root / "events" / f"dt={DATE}").rmdir()
    assert f"restore {train} from a copy" in verify(tmp_path, lambda *_: None)[1]


@pytest.mark.parametrize("name", ["codebooks.safetensors", "carries.safetensors", "manifest.json"])
def test_damaged_codebooks_are_found(tmp_path: Path, name: str) -> None:
    root = codebook_versions(tmp_path)
    codebooks = Codebooks(ResidualCodebooks(torch.arange(8.0).reshape(1, 4, 2)))
    manifest = CodebookManifest(
        version="v0001",
        parent=None,
        fingerprint="",
        encoder="tower-1",
        first_day=DATE,
        last_day=DATE,
        config=Codes(rq=Rq(num_levels=2, codebook_size=4)),
        num_items=8,
        dim=2,
        table_sizes=codebooks.table_sizes,
        reference_mse=None,
        metrics=None,
        stability=None,
        share_carried={},
    )
    publish_version(root, manifest, codebooks, {"sid_0": fresh(0, 4)})
    assert verify(tmp_path, lambda *_: None) == []

    path = root / "v0001" / name
    if name == "codebooks.safetensors":
        damage(path)  # other numbers, and still a sound file
    else:
        path.write_bytes(path.read_bytes()[:20])
    (found,) = verify(tmp_path, lambda *_: None)

    assert str(root / "v0001") in found
    assert "restore" in found


def test_a_damaged_manifest_is_one_finding_among_others(tmp_path: Path) -> None:
    train = write_artifact(tmp_path, "train")
    published = write_artifact(tmp_path, "publish", stage_facts.published(DATE))
    text = (published / "manifest.json").read_text()
    (published / "manifest.json").write_text(text.replace('version": 1', 'version": 9'))
    damage(train / "bundle" / "weights")

    of_publish, of_train = verify(tmp_path, lambda *_: None)

    assert f"{published / 'manifest.json'} is damaged or of another version of Braid" in of_publish
    assert "schema_version" in of_publish
    assert str(train / "bundle" / "weights") in of_train


def test_an_ingest_of_other_facts_is_one_finding_too(tmp_path: Path) -> None:
    ingest = write_artifact(tmp_path, "ingest", stage_facts.ingested([DATE]))
    manifest = ingest / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_buckets"', '"buckets"'))
    damage(ingest / "bundle" / "weights")
    train = write_artifact(tmp_path, "train")
    damage(train / "bundle" / "weights")

    found = verify(tmp_path, lambda *_: None)

    assert len(found) == 2
    assert [sentence for sentence in found if "facts.num_buckets" in sentence]


def test_an_empty_directory_has_nothing_damaged(tmp_path: Path) -> None:
    assert verify(tmp_path, lambda *_: None) == []


def test_what_a_run_replaces_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the artifact of before are gone when they are compared with its manifest."""
    write_log(tmp_path, [DATE])
    directory = write_artifact(tmp_path, "train")
    replaced = []

    def damaged(path: Path, *, thorough: bool) -> list[str]:
        if path == directory and len(replaced) < 2:
            replaced.append(write_artifact(tmp_path, "train"))
            if len(replaced) == 1:
                raise FileNotFoundError("bundle/weights")
            return ["bundle/weights"]
        return damaged_files(path, thorough=thorough)

    monkeypatch.setattr(verify_module, "damaged_files", damaged)
    assert verify(tmp_path, lambda *_: None) == []
    assert len(replaced) == 2

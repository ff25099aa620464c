"""Everything in an output directory is read, and what differs is named with the remedy."""

import os
from pathlib import Path

import numpy as np
import torch

from multimodal.token_store import PartTokens, TokenStore
from pipeline.artifacts import Manifest, publish, writing
from pipeline.content import STORES
from pipeline.registry import promote
from pipeline.verify import verify

DATE = "2024-01-01"


def write_artifact(out: Path, stage: str) -> Path:
    directory = out / DATE / stage
    with writing(directory, "i") as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_bytes(b"weights of " + stage.encode())
        publish(scratch, directory, Manifest(stage=stage, artifact_id=stage, config_hash=""))
    return directory


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
    train, published = (write_artifact(tmp_path, stage) for stage in ("train", "publish"))
    promote(tmp_path, DATE)
    part = write_part(tmp_path)
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


def test_an_empty_directory_has_nothing_damaged(tmp_path: Path) -> None:
    assert verify(tmp_path, lambda *_: None) == []

"""Codebook files and versions on disk."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from vector_sets import clustered

from embedding.errors import UserError
from multimodal.codes.config import Codes, Fsq, Rq, Vq
from multimodal.codes.metrics import measure_codes
from multimodal.codes.refit import refit
from multimodal.codes.store import FILE, Codebooks
from multimodal.codes.versions import (
    CodebookManifest,
    find_version,
    latest,
    load_version,
    next_version,
    publish_version,
    take_version,
    versions,
)

X = clustered(800)
CONFIG = Codes(rq=Rq(num_levels=2, codebook_size=16, fsq=Fsq(num_directions=4)), vq=Vq(top_k=4))


@pytest.fixture(scope="module")
def codebooks() -> Codebooks:
    return refit(CONFIG, np.arange(800), X).codebooks


def manifest_of(codebooks: Codebooks, version: str) -> CodebookManifest:
    assert codebooks.residual
    return CodebookManifest(
        version=version,
        parent=None,
        fingerprint="",
        encoder="tower-1",
        first_day="2026-01-01",
        last_day="2026-01-31",
        config=CONFIG,
        num_items=800,
        dim=16,
        table_sizes=codebooks.table_sizes,
        reference_mse=0.1,
        metrics=measure_codes(X, codebooks.residual.encode(X), codebooks.residual),
        stability=None,
        share_carried={},
    )


def test_a_version_is_read_back_as_it_was(tmp_path: Path, codebooks: Codebooks) -> None:
    assert next_version(tmp_path) == "v0001"
    publish_version(tmp_path, manifest_of(codebooks, "v0001"), codebooks, {})

    loaded = load_version(tmp_path, "v0001")

    assert loaded.residual
    assert codebooks.residual
    assert loaded.items
    assert codebooks.items
    assert (loaded.residual.encode(X) == codebooks.residual.encode(X)).all()
    assert (loaded.items.item_ids_N == codebooks.items.item_ids_N).all()
    assert loaded.fingerprint == codebooks.fingerprint == latest(tmp_path).fingerprint  # type: ignore[union-attr]
    assert loaded.table_sizes == {"sid_0": 16, "sid_1": 16, "sid_2": 16, "vq": 800}
    assert not list(tmp_path.glob(".*"))


def test_versions_are_ordered_and_never_changed(tmp_path: Path, codebooks: Codebooks) -> None:
    for _ in range(3):
        version = next_version(tmp_path)
        publish_version(tmp_path, manifest_of(codebooks, version), codebooks, {})
    assert [m.version for m in versions(tmp_path)] == ["v0001", "v0002", "v0003"]
    with pytest.raises(UserError, match="never changed; publish as v0004"):
        publish_version(tmp_path, manifest_of(codebooks, "v0002"), codebooks, {})


def test_a_half_written_version_is_invisible(tmp_path: Path, codebooks: Codebooks) -> None:
    partial = tmp_path / ".v0001.partial"
    partial.mkdir()
    codebooks.save(partial)
    (tmp_path / "v0001").mkdir()
    assert latest(tmp_path) is None


def test_wrong_versions_and_files_are_named(tmp_path: Path, codebooks: Codebooks) -> None:
    with pytest.raises(UserError, match=r"'v0007' is not in .*\(there are: none\)"):
        find_version(tmp_path, "v0007")
    publish_version(tmp_path, manifest_of(codebooks, "v0001"), codebooks, {})
    with pytest.raises(UserError, match=r"'v0007' is not in .*\(there are: v0001\); name one"):
        load_version(tmp_path, "v0007")

    other = Codebooks(residual=codebooks.residual)
    other.save(tmp_path / "v0001")
    with pytest.raises(UserError, match="the file was changed"):
        load_version(tmp_path, "v0001")
    (tmp_path / "v0001" / FILE).write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="cannot be read as codebooks"):
        load_version(tmp_path, "v0001")
    (tmp_path / "v0001" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is no codebook manifest"):
        versions(tmp_path)


class Disk:
    """What has been written to disk, in order; of directories, with the names they had then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
        self.directories = directories
        self.synced: list[int] = []
        self.names: dict[Path, set[str]] = {}
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, number: int) -> None:
        node = os.fstat(number).st_ino
        self.synced.append(node)
        for path in self.directories:
            if path.exists() and path.stat().st_ino == node:
                self.names[path] = {entry.name for entry in path.iterdir()}

    def time(self, path: Path) -> int:
        return self.synced.index(path.stat().st_ino)


def test_versions_are_on_disk_before_they_are_there(
    tmp_path: Path, codebooks: Codebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made" / "codebooks"
    root.parent.mkdir()
    disk = Disk(monkeypatch, root, root.parent)
    directory = publish_version(root, manifest_of(codebooks, "v0001"), codebooks, {})
    for name in (FILE, "carries.safetensors"):
        assert disk.time(directory / name) < disk.time(directory / "manifest.json")
    assert disk.names == {root: {"v0001"}, root.parent: {"codebooks"}}

    other = tmp_path / "taken" / "codebooks"
    other.parent.mkdir()
    disk = Disk(monkeypatch, other, other.parent)
    take_version(root, other, "v0001")
    for path in (other / "v0001", *(other / "v0001").iterdir()):
        disk.time(path)
    assert disk.names == {other: {"v0001"}, other.parent: {"codebooks"}}


def test_fingerprint_tells_any_change(codebooks: Codebooks) -> None:
    assert codebooks.residual
    changed = codebooks.residual.codebooks_LKD.clone()
    changed[1, 3, 2] = torch.nextafter(changed[1, 3, 2], torch.tensor(9.0))
    other = Codebooks(type(codebooks.residual)(changed, codebooks.residual.fsq), codebooks.items)
    assert other.fingerprint != codebooks.fingerprint

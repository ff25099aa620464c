"""Versions of the codebooks: one directory each, visible once its manifest is there.

    ROOT/v0001/{codebooks.safetensors, carries.safetensors, manifest.json}
    ROOT/v0002/...

A version is never changed. Code tables belong to one version, so a ranker names the one it uses.
"""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import link_tree, sync, write_durably
from multimodal.codes.config import Codes
from multimodal.codes.figures import CodeMetrics, Stability
from multimodal.codes.match import Carry, fresh
from multimodal.codes.store import FILE, Codebooks, fitted_anew

MANIFEST = "manifest.json"
CARRIES = "carries.safetensors"


class CodebookManifest(StrictConfig):
    """What a version is made of; schema version 1."""

    schema_version: Literal[1] = 1
    version: str
    parent: str | None
    """The version whose code numbers it goes on with."""
    fingerprint: str
    """Of the codebooks."""
    encoder: str
    """Identity of the encoder whose vectors they were fitted to; others have no meaning here."""
    first_day: str
    """Of the training window, like 2026-01-31."""
    last_day: str
    config: Codes
    num_items: int
    dim: int
    table_sizes: dict[str, int]
    """Codes by code column; a table has one row more."""
    reference_mse: float | None
    """Quantization error of items that the fit did not see: what new items are compared with."""
    metrics: CodeMetrics | None
    """Of the RQ codes of the items of the fit."""
    stability: Stability | None
    """Against the parent."""
    share_carried: dict[str, float]
    """By code column: share of codes that go on with a meaning of the parent."""
    created_at: str = ""


def versions(root: Path) -> list[CodebookManifest]:
    """All versions, oldest first."""
    return list(_manifests(root))


def latest(root: Path) -> CodebookManifest | None:
    """The newest version, or None."""
    known = versions(root)
    return known[-1] if known else None


def named_version(root: Path, codebooks: str) -> str:
    """The version of codebooks that are named by version and fingerprint (`vNNNN-FINGERPRINT`).

    Raises:
        UserError: it is gone, or another one has its name.
    """
    version, _, fingerprint = codebooks.partition("-")
    found = {manifest.version: manifest.fingerprint for manifest in versions(root)}.get(version)
    if found != fingerprint:
        holds = "is gone" if found is None else f"holds codebooks {found}"
        raise UserError(
            f"{root / version} {holds}, and a model was trained with codes of {codebooks}: its "
            "code tables say nothing of others; restore those codebooks, or start from drawn "
            "values (--set window.warm_start=false)"
        )
    return version


def next_version(root: Path) -> str:
    """The name that the next version gets."""
    newest = latest(root)
    return f"v{int(newest.version[1:]) + 1 if newest else 1:04d}"


def publish_version(
    root: Path, manifest: CodebookManifest, codebooks: Codebooks, carries: dict[str, Carry]
) -> Path:
    """Write a version aside and rename it into place; it is on disk before the call returns.

    Args:
        root: directory of the versions.
        manifest: fingerprint and time are filled in here.
        codebooks: what the version consists of.
        carries: rows of the code tables against the parent, by code column.

    Raises:
        UserError: the version exists.
    """
    directory = root / manifest.version
    if directory.exists():
        raise UserError(
            f"{directory} exists, and versions are never changed; publish as {next_version(root)}"
        )
    scratch = root / f".{manifest.version}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    codebooks.save(scratch)
    _save_carries(carries, scratch / CARRIES)
    stamped = manifest.model_copy(
        update={
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": codebooks.fingerprint,
        }
    )
    for name in (FILE, CARRIES):
        sync(scratch / name)
    write_durably(scratch / MANIFEST, stamped.model_dump_json(indent=2))
    scratch.rename(directory)
    _sync_names(root)
    return directory


def find_version(root: Path, version: str) -> CodebookManifest:
    """The manifest of a version.

    Raises:
        UserError: there is no such version.
    """
    known = versions(root)
    for manifest in known:
        if manifest.version == version:
            return manifest
    names = ", ".join(manifest.version for manifest in known) or "none"
    raise UserError(
        f"codebook version {version!r} is not in {root} (there are: {names}); name one of these, "
        f"or restore it if it was removed; {fitted_anew(version)} (with window.warm_start=false, "
        "if a model was trained with codes of it)"
    )


def load_version(root: Path, version: str) -> Codebooks:
    """The codebooks of a version.

    Args:
        root: directory of the versions.
        version: like v0001.

    Raises:
        UserError: unknown version, or damaged files.
    """
    manifest = find_version(root, version)
    codebooks = Codebooks.load(root / version)
    if codebooks.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{root / version} holds codebooks {codebooks.fingerprint}, and its manifest names "
            f"{manifest.fingerprint}: the file was changed; restore it; {fitted_anew(version)}"
        )
    return codebooks


def damaged_versions(root: Path) -> list[str]:
    """What is wrong with the versions, a sentence each; empty if they are as they were written."""
    try:
        known = versions(root)
    except UserError as error:
        return [str(error)]
    return [fault for m in known if (fault := _fault(root, m.version)) is not None]


def _fault(root: Path, version: str) -> str | None:
    path = root / version / CARRIES
    try:
        load_version(root, version)
        _load_carries(path)
    except UserError as error:
        return str(error)
    except (OSError, SafetensorError, KeyError) as error:
        return f"{path} cannot be read ({error}); restore it: rows of code tables are carried by it"
    return None


def take_version(source: Path, root: Path, version: str) -> None:
    """Give a version of another directory, and those it goes on with, a second place in `root`.

    Args:
        source: directory of the other versions.
        root: directory of the versions, those taken earlier among them.
        version: of `source`.

    Raises:
        UserError: unknown or damaged there, or `root` has other codebooks of that name.
    """
    known = {manifest.version: manifest for manifest in versions(root)}
    for name in reversed(lineage(source, version)):  # a version is never without its parent
        theirs, ours = find_version(source, name), known.get(name)
        if ours is None:
            load_version(source, name)
            root.mkdir(parents=True, exist_ok=True)
            link_tree(source / name, root / name)
            _sync_names(root)
        elif (ours.fingerprint, ours.parent) != (theirs.fingerprint, theirs.parent):
            raise UserError(
                f"{root} has codebooks {name} ({ours.fingerprint}) already, and those of {source} "
                f"are others ({theirs.fingerprint}): tables that were trained with one would be "
                "read with the other; use an output directory of their own"
            )


def are_related(root: Path, before: str, after: str) -> bool:
    """Whether code numbers of both go back to one version, so that rows can be carried.

    Raises:
        UserError: an unknown version.
    """
    return bool({*lineage(root, before)} & {*lineage(root, after)})


def carries_between(root: Path, before: str, after: str) -> dict[str, Carry]:
    """Rows of the code tables from one version to another, over all versions in between.

    Back to the last version that both go back to, if `after` does not descend from `before`: a
    rollback takes the refits since then back.

    Raises:
        UserError: an unknown version, or versions that share no code numbers.
    """
    back, forth = lineage(root, before), lineage(root, after)
    common = next((version for version in back if version in forth), None)
    if common is None:
        raise UserError(
            f"codebooks {after} share no code numbers with {before}, so no row of its code tables "
            "has a counterpart; start the code tables anew"
        )
    steps = [_taken_back(root, version) for version in back[: back.index(common)]]
    steps += [
        _load_carries(root / version / CARRIES)
        for version in reversed(forth[: forth.index(common)])
    ]
    found = steps[0] if steps else {}
    for step in steps[1:]:
        found = {
            column: carry.after(found[column])
            if column in found
            else fresh(0, len(carry.source_K))  # the versions before have no such column
            for column, carry in step.items()
        }
    return found


def lineage(root: Path, version: str) -> list[str]:
    """A version, the one it goes on with, and so on."""
    known = {manifest.version: manifest for manifest in versions(root)}
    names = [find_version(root, version).version]
    while (parent := known[names[-1]].parent) is not None:
        names.append(find_version(root, parent).version)
    return names


def _taken_back(root: Path, version: str) -> dict[str, Carry]:
    """Rows of the code tables from a version to its parent."""
    parent = find_version(root, version).parent
    assert parent is not None
    sizes = find_version(root, parent).table_sizes
    return {
        column: carry.inverse(sizes[column])
        for column, carry in _load_carries(root / version / CARRIES).items()
        if column in sizes
    }


def _save_carries(carries: dict[str, Carry], path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for column, carry in carries.items():
        arrays[f"{column}.source"] = carry.source_K
        arrays[f"{column}.carried"] = carry.carried_K
        arrays[f"{column}.num_before"] = np.array([carry.num_before])
    save_file(arrays, path)


def _load_carries(path: Path) -> dict[str, Carry]:
    arrays = load_file(path)
    columns = {name.rpartition(".")[0] for name in arrays}
    return {
        column: Carry(
            int(arrays[f"{column}.num_before"][0]),
            arrays[f"{column}.source"],
            arrays[f"{column}.carried"],
        )
        for column in sorted(columns)
    }


def _manifests(root: Path) -> Iterator[CodebookManifest]:
    for path in sorted(root.glob(f"v*/{MANIFEST}"), key=lambda p: (len(p.parent.name), p)):
        try:
            yield CodebookManifest.model_validate_json(path.read_text())
        except ValidationError as error:
            raise UserError(
                f"{path} is no codebook manifest ({error.error_count()} faults, first: "
                f"{error.errors()[0]['msg']}); restore it; {fitted_anew(path.parent.name)} (remove "
                f"{path.parent}, too, and set window.warm_start=false)"
            ) from error


def _sync_names(root: Path) -> None:
    """A version that has its place, and the directory of the versions if it is new, stay there."""
    for directory in (root, root.parent):
        sync(directory)

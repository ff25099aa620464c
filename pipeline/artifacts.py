"""Artifacts: directories that exist only once their manifest does.

A stage writes into a hidden directory beside its final place and renames it at the end, so a crash
leaves nothing half-visible and the next run finds either the whole artifact or none. That holds
when the power fails, too: the files are on disk before the manifest is.
"""

import hashlib
import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import file_sha256, sync, write_durably

MANIFEST = "manifest.json"
RESUME = "resume"


class StageFacts(StrictConfig):
    """What a stage says of its artifact beyond rows and files; every stage has its own class."""


class UnreadFacts(StageFacts):
    """Of any stage, for readers who do not look into them."""

    model_config = ConfigDict(extra="allow")


FactsT_co = TypeVar("FactsT_co", bound=StageFacts, covariant=True)


class Manifest(StrictConfig, Generic[FactsT_co]):
    """What an artifact is made of; version 1."""

    schema_version: Literal[1] = 1
    stage: str
    artifact_id: str
    """Hash of stage, config and inputs: equal ids mean equal content."""
    config_hash: str
    inputs: dict[str, str] = Field(default_factory=dict)
    """Input artifact ids and source fingerprints by name."""
    rows_in: int = 0
    rows_out: int = 0
    quarantined: dict[str, int] = Field(default_factory=dict)
    """Rows put aside, by reason."""
    facts: SerializeAsAny[FactsT_co]  # written whole, whatever class a reader asks for
    warnings: tuple[str, ...] = ()
    """Sentences on what the stage did not stop for."""
    checksums: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every file, by path relative to the artifact."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Bytes of the same files, which are compared whenever a stage might be current."""
    seconds: float = 0.0
    created_at: str = ""


def config_hash(config: BaseModel | dict[str, Any]) -> str:
    """Short hash of a configuration's canonical JSON."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def artifact_id(stage: str, config: str, inputs: dict[str, str]) -> str:
    """Identity of what a stage would produce from this config hash and these inputs."""
    return config_hash({"stage": stage, "config": config, "inputs": inputs})


@overload
def read_manifest(directory: Path) -> Manifest[UnreadFacts] | None: ...
@overload
def read_manifest(directory: Path, facts: type[FactsT_co]) -> Manifest[FactsT_co] | None: ...
def read_manifest(
    directory: Path, facts: type[StageFacts] = UnreadFacts
) -> Manifest[StageFacts] | None:
    """The manifest of a finished artifact, or None where there is none.

    Args:
        directory: of the artifact.
        facts: those of the stage that wrote it, for readers who look into them.

    Raises:
        UserError: it cannot be read, or its facts are others.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        # The parameter is a value here, which type checkers know nothing of.
        return Manifest[facts].model_validate_json(path.read_text())  # type: ignore[valid-type]
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(
            f"{path} is damaged or of another version of Braid "
            f"({'.'.join(map(str, fault['loc']))}: {fault['msg']}); restore it, or choose another "
            "output directory"
        ) from error


@contextmanager
def writing(directory: Path, identity: str) -> Iterator[Path]:
    """A scratch directory beside `directory`; removed if the block raises.

    Call `publish` inside the block to make the artifact visible. What a killed process left in the
    scratch directory is removed first, except a `resume/` folder written for the same `identity`:
    it is the stage's own (training keeps its checkpoints there) and outlives failures. Work of
    another identity is set aside (`abandoned`).
    """
    scratch = _beside(directory, "partial")
    resume = scratch / RESUME
    marker = resume / "identity"
    if scratch.exists():
        if _has_work(resume) and marker.read_text() != identity:
            shutil.rmtree(_beside(directory, "abandoned"), ignore_errors=True)
            scratch.rename(_beside(directory, "abandoned"))
        else:
            for entry in scratch.iterdir():
                if entry != resume:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    resume.mkdir(parents=True, exist_ok=True)
    marker.write_text(identity)
    try:
        yield scratch
    except BaseException:
        if scratch.exists() and not _has_work(resume):
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def abandoned(directory: Path, identity: str) -> Path | None:
    """Where `writing` would set aside unfinished work that another identity left; None: nowhere."""
    resume = _beside(directory, "partial") / RESUME
    if not _has_work(resume) or (resume / "identity").read_text() == identity:
        return None
    return _beside(directory, "abandoned")


def publish(scratch: Path, directory: Path, manifest: Manifest[FactsT_co]) -> Manifest[FactsT_co]:
    """Checksum the files of `scratch`, write the manifest last, and rename to `directory`.

    A process that dies on the way loses nothing: without the manifest the stage resumes, with it
    `finish_interrupted` completes the renaming.
    """
    files: dict[str, Path] = {}
    for path in sorted(scratch.rglob("*")):
        name = path.relative_to(scratch)
        if name.parts[0] in (RESUME, MANIFEST):
            continue
        sync(path)
        if path.is_file():
            files[str(name)] = path
    finished = manifest.model_copy(
        update={
            "checksums": {name: file_sha256(path) for name, path in files.items()},
            "sizes": {name: path.stat().st_size for name, path in files.items()},
            "created_at": datetime.now(UTC).isoformat(),
        }
    )
    write_durably(scratch / MANIFEST, finished.model_dump_json(indent=2))
    _reveal(scratch, directory)
    return finished


def finish_interrupted(directory: Path) -> None:
    """Complete what a process that died inside `publish` had begun."""
    scratch, outdated = _beside(directory, "partial"), _beside(directory, "outdated")
    if (scratch / MANIFEST).exists():
        _reveal(scratch, directory)
    elif outdated.exists() and not directory.exists():
        outdated.rename(directory)
    elif (directory / RESUME).exists():
        shutil.rmtree(directory / RESUME)


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """A block that reads a published artifact without holding its output directory.

    Raises:
        UserError: A run replaced the artifact meanwhile; whatever else went wrong came of that.
    """
    before = read_manifest(directory)
    try:
        yield
    finally:
        if read_manifest(directory) != before:
            raise UserError(
                f"{directory} was written anew at this moment; run the same command again"
            )


def damaged_files(directory: Path, *, thorough: bool) -> list[str]:
    """Files of a published artifact that are missing or of another size.

    If `thorough`, also those with another checksum.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return []
    return [
        name
        for name, checksum in manifest.checksums.items()
        if _size(directory / name) != manifest.sizes.get(name, -1)
        or (thorough and file_sha256(directory / name) != checksum)
    ]


def _size(path: Path) -> int | None:
    """Of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _reveal(scratch: Path, directory: Path) -> None:
    outdated = _beside(directory, "outdated")
    if directory.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        directory.rename(outdated)
    scratch.rename(directory)
    sync(directory.parent)
    shutil.rmtree(directory / RESUME, ignore_errors=True)
    shutil.rmtree(outdated, ignore_errors=True)


def _has_work(resume: Path) -> bool:
    return resume.exists() and any(entry.name != "identity" for entry in resume.iterdir())


def _beside(directory: Path, what: str) -> Path:
    return directory.parent / f".{directory.name}.{what}"

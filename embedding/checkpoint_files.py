"""Checkpoints as files: where they lie and what their manifests say; imports nothing heavy.

<directory>/step-00000120/            visible only when complete
    manifest.json                     step, plan, progress, sizes and checksums of the files
    .metadata, __0_0.distcp, ...      tensors (torch.distributed.checkpoint), a file per rank
"""

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from embedding.config import StrictConfig
from embedding.errors import CheckpointError, UserError
from embedding.planning.plan_description import PlanDescription

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BUFFERS = "buffers/"
"""Prefix of buffers outside the tables."""
COMPANION = "companion/"
"""Prefix of the tensors of what trains beside the model."""


class ManagedClock(StrictConfig):
    """Counters of one rank's collision module."""

    iteration: int
    last_eviction: int
    num_pending: int
    """Ids seen since the last eviction."""


class StoredTable(StrictConfig):
    """Shape of a saved table and its optimizer's step."""

    num_rows: int
    num_columns: int
    ids: str
    """Kind of the id scheme."""
    step: int


class StoredFile(StrictConfig):
    """Size and CRC-32 of a file of the checkpoint."""

    num_bytes: int
    crc32: int


class RankFacts(StrictConfig):
    """What one rank contributes to the manifest."""

    rank: int
    progress: dict[str, Any]
    table_steps: dict[str, int]
    clocks: dict[str, ManagedClock]
    segments: dict[str, tuple[int, int]]
    """Rows of this rank's shard of every managed-collision table."""


class CheckpointManifest(StrictConfig):
    """Everything of a checkpoint that is not a tensor; version 1."""

    schema_version: Literal[1] = 1
    step: int
    world_size: int
    optimizer: str
    """Kind of the sparse optimizer."""
    plan: PlanDescription
    tables: dict[str, StoredTable]
    ranks: tuple[RankFacts, ...]
    dense_scalars: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """States of the dense optimizer that are no tensors, by parameter."""
    dense_groups: tuple[dict[str, Any], ...] = ()
    """Settings of the dense optimizer's parameter groups."""
    files: dict[str, StoredFile] = Field(default_factory=dict)

    def segments(self, table: str) -> list[tuple[int, int]]:
        """Row ranges of the shards of a managed-collision table, by rank."""
        return [facts.segments[table] for facts in self.ranks]


def latest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint whose files have their full size, or None."""
    for step in sorted(steps(directory), reverse=True):
        folder = step_directory(directory, step)
        try:
            manifest = read_manifest(folder)
        except UserError as error:
            logger.warning("%s; skipped", error)
            continue
        sizes = {name: file.num_bytes for name, file in manifest.files.items()}
        if all(
            (folder / name).exists() and (folder / name).stat().st_size == size
            for name, size in sizes.items()
        ):
            return step
        logger.warning("the checkpoint %s has missing or truncated files; skipped", folder)
    return None


def steps(directory: Path) -> list[int]:
    """Steps of all published checkpoints."""
    return [int(path.parent.name.split("-")[1]) for path in directory.glob(f"step-*/{MANIFEST}")]


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return directory / f"step-{step:08d}"


def read_manifest(directory: Path) -> CheckpointManifest:
    """The manifest of one checkpoint; raises CheckpointError if there is none, or a damaged one."""
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        return CheckpointManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged or of another version of Braid ({error.errors()[0]['msg']}); "
            "restore it from a copy, or, where it is one of several of an interrupted training, "
            "delete its folder to continue from the one before"
        ) from error

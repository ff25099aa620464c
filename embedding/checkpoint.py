"""Distributed checkpoints: atomic, verified, retained, and loadable by any plan and world size.

<directory>/step-00000120/            visible only when complete
    manifest.json                     step, plan, progress, sizes and checksums of the files
    .metadata, __0_0.distcp, ...      tensors (torch.distributed.checkpoint), a file per rank
<directory>/.step-00000240.partial/   being written, or left by a killed run
<directory>/.step-00000240.damaged/   set aside when training went on from the one before
"""

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from embedding.capture import capture, make_manifest, rank_facts
from embedding.checkpoint_files import (
    MANIFEST,
    CheckpointManifest,
    StoredFile,
    latest_step,
    read_manifest,
    step_directory,
    steps,
)
from embedding.errors import CheckpointError, UserError
from embedding.files import sync
from embedding.restore import restore_all
from embedding.row_carry import RowCarry
from embedding.shard import Sharded
from embedding.stored import CheckpointReader, StoredTensor, StoredTensorPlanner
from embedding.warm_start import warm_start
from embedding.warm_start_report import WarmStartReport

logger = logging.getLogger(__name__)

_READ_BYTES = 4 << 20
_ONE_OF_SEVERAL = "delete it to continue from the one before, or restore it from a copy"
_MADE_ONCE = "restore it from a copy, or make it again"
"""A finished training keeps one checkpoint: there is none before it."""

T = TypeVar("T")


class Checkpointer:
    """Saves and loads the training state of one run. Every rank makes the same calls.

    A context manager: behind it, everything is written, and thread and group are gone.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """`keep`: latest complete checkpoints kept. Creates its own gloo group for saving."""
        self.directory = directory
        self._keep = keep
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        step: int,
        sharded: Sharded,
        progress: dict[str, Any],
        *,
        wait: bool = True,
        retain: int | None = None,
    ) -> None:
        """Save everything training needs to continue after `step`.

        Args:
            step: number of finished steps; a checkpoint of the same step is replaced.
            sharded: the training state.
            progress: JSON-able facts (data position, metric windows). Those of rank 0 hold for all
                ranks, but for the ones that a rank gives itself.
            wait: False copies this rank's shards to host memory and writes them in the
                background; True writes them in place, without a copy.
            retain: a step whose checkpoint is not removed, however many come after it; this
                replaces what was retained before.
        """
        self.wait()
        ranks: list[Any] = [None] * self._world_size
        facts = rank_facts(sharded, self._rank, progress)
        dist.all_gather_object(ranks, facts, group=self._group)
        manifest = make_manifest(sharded, step, ranks)
        tensors = capture(sharded, manifest.ranks, self._rank)
        if wait:
            self._write(manifest, tensors, retain)
            return
        staged = {name: tensor.staged() for name, tensor in tensors.items()}
        self._pending = self._thread.submit(self._write, manifest, staged, retain)

    def wait(self) -> None:
        """Until the checkpoint in the background is complete; raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self, *, is_orderly: bool = True) -> None:
        """Finish what is being written; end the thread and the group.

        Args:
            is_orderly: all ranks call it. False: this rank has failed, and waits for nobody.
        """
        if not is_orderly and self._world_size > 1:
            # The group's process ends, and its thread may be waiting for a rank that never comes.
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            if is_orderly:
                self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(is_orderly=error is None)

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint whose files have their full size, or None."""
        return latest_step(self.directory)

    def load(self, step: int, sharded: Sharded) -> dict[str, Any]:
        """Restore the checkpoint of `step` exactly; any plan, any world size.

        Returns:
            The progress of rank 0 with what this rank saved itself, if the world size has not
            changed.

        Raises:
            UserError: if a file is missing or damaged, or the checkpoint does not fit the model.
        """
        directory = step_directory(self.directory, step)
        return self._restore(directory, _verified(directory, self._group), sharded)

    def load_latest(self, sharded: Sharded) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest undamaged checkpoint: (step, progress), or None if there is none.

        Damaged ones are logged and skipped; when an older one is restored, they are set aside.
        """
        found = _of_rank_0(lambda: sorted(steps(self.directory), reverse=True), self._group)
        for tried, step in enumerate(found):
            directory = step_directory(self.directory, step)
            try:
                manifest = _verified(directory, self._group)
            except UserError as error:
                logger.warning("%s; falling back to the checkpoint before", error)
                continue
            progress = self._restore(directory, manifest, sharded)
            if self._rank == 0:
                self._set_aside(found[:tried])
            return step, progress
        return None

    def _set_aside(self, damaged: list[int]) -> None:
        """So that they are not among the latest that are kept."""
        for step in damaged:
            directory = step_directory(self.directory, step)
            aside = self.directory / f".{directory.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)

    def _restore(
        self, directory: Path, manifest: CheckpointManifest, sharded: Sharded
    ) -> dict[str, Any]:
        restore_all(CheckpointReader(directory), manifest, sharded)
        progress = manifest.ranks[0].progress
        if manifest.world_size == self._world_size:
            progress = {**progress, **manifest.ranks[self._rank].progress}
        return progress

    def _write(
        self, manifest: CheckpointManifest, tensors: dict[str, StoredTensor], retain: int | None
    ) -> None:
        final = step_directory(self.directory, manifest.step)
        partial = self.directory / f".{final.name}.partial"
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier(group=self._group)
        self._write_tensors(tensors, partial)
        gathered: list[Any] = [None] * self._world_size
        mine = {path.name: _stored_file(path) for path in partial.glob(f"__{self._rank}_*")}
        dist.all_gather_object(gathered, mine, group=self._group)
        if self._rank == 0:
            files = {name: file for part in gathered for name, file in part.items()}
            files[".metadata"] = _stored_file(partial / ".metadata")
            _publish(partial, final, manifest.model_copy(update={"files": files}))
            # Later steps were skipped as damaged before this one was trained.
            up_to_now = sorted(step for step in steps(self.directory) if step <= manifest.step)
            for step in up_to_now[: -self._keep]:
                if step != retain:
                    shutil.rmtree(step_directory(self.directory, step))
        dist.barrier(group=self._group)

    def _write_tensors(self, tensors: dict[str, StoredTensor], partial: Path) -> None:
        """Raises: on all ranks, what went wrong on the first one that could not write."""
        try:
            save_distributed(
                tensors,
                storage_writer=FileSystemWriter(
                    partial, single_file_per_rank=True, sync_files=True
                ),
                planner=StoredTensorPlanner(),
                process_group=self._group,
            )
        except CheckpointException as error:  # no `Exception`: whoever catches those would miss it
            if self._rank == 0:  # a full disk has no room for it
                shutil.rmtree(partial, ignore_errors=True)
            cause, _ = error.failures[min(error.failures)]
            if isinstance(cause, OSError) and cause.filename is None:
                cause.filename = str(partial)
            raise cause from error


def load_into(
    directory: Path,
    sharded: Sharded,
    carries: Mapping[str, RowCarry] | None = None,
    average_of: Callable[[str], str] | None = None,
) -> WarmStartReport:
    """Warm start from the newest checkpoint of another run; says what was taken over.

    Args:
        directory: checkpoints of that run.
        sharded: the model; tables hold their start values.
        carries: tables whose rows have changed their meaning since.
        average_of: see `embedding.warm_start.warm_start`.

    Raises:
        CheckpointError: if the directory has no complete checkpoint, or a damaged one.
        UserError: if a table has another size than its codebooks.
    """
    step = _of_rank_0(lambda: latest_step(directory))
    if step is None:
        raise CheckpointError(
            f"{directory} has no complete checkpoint, files are missing or cut off; {_MADE_ONCE}"
        )
    source = step_directory(directory, step)
    manifest = _verified(source, remedy=_MADE_ONCE)
    return warm_start(CheckpointReader(source), manifest, sharded, carries, average_of)


def _verified(
    directory: Path, group: dist.ProcessGroup | None = None, *, remedy: str = _ONE_OF_SEVERAL
) -> CheckpointManifest:
    """The manifest, once every file equals its checksum; the ranks divide the files.

    Args:
        directory: of one checkpoint.
        group: of the ranks.
        remedy: what to do about a damaged one.

    Raises:
        CheckpointError: on all ranks, naming the files that are missing or damaged.
    """
    manifest = _of_rank_0(lambda: read_manifest(directory), group)
    world_size = dist.get_world_size(group)
    names = sorted(manifest.files)[dist.get_rank(group) :: world_size]
    damaged = [problem for name in names if (problem := _damage(directory, name, manifest))]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, damaged, group=group)
    problems = [problem for part in gathered for problem in part]
    if problems:
        raise CheckpointError(
            f"the checkpoint {directory} is damaged: {', '.join(problems)}; {remedy}"
        )
    return manifest


def _of_rank_0(read: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What rank 0 reads, on all ranks, whose views of a shared file system may differ for a while.

    Raises:
        UserError: on all ranks, where rank 0 raises it.
    """
    outcome: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            outcome = [read()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return cast(T, outcome[0])


def _publish(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    path = partial / MANIFEST
    with path.open("w") as file:
        file.write(manifest.model_dump_json(indent=2))
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)


def _damage(directory: Path, name: str, manifest: CheckpointManifest) -> str | None:
    path, expected = directory / name, manifest.files[name]
    if not path.exists():
        return f"{name} is missing"
    found = path.stat().st_size
    if found != expected.num_bytes:
        return f"{name} has {found} bytes instead of {expected.num_bytes}"
    if _stored_file(path).crc32 != expected.crc32:
        return f"{name} has another checksum"
    return None


def _stored_file(path: Path) -> StoredFile:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    return StoredFile(num_bytes=path.stat().st_size, crc32=crc)

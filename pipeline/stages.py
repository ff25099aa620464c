"""Running one stage: skip it when its artifact is current, else write and publish it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.markup import escape

from embedding.config import StrictConfig
from embedding.files import write_durably
from pipeline.artifacts import (
    Manifest,
    StageFacts,
    abandoned,
    artifact_id,
    config_hash,
    damaged_files,
    finish_interrupted,
    publish,
    read_manifest,
    writing,
)
from pipeline.console import Reporter, duration, human
from pipeline.failures import last_line, user_error
from pipeline.lock import Holder, this_process

CATCH_UP = "catch_up"
STAGES = (
    *("ingest", "content", "align", "quantize", "join", "plan", "train", "evaluate", "gate"),
    *(CATCH_UP, "publish"),
)
"""Of a run, in their order."""


@dataclass(frozen=True)
class StageOutput:
    """What a stage's body returns besides the files it wrote."""

    rows_in: int
    rows_out: int
    facts: StageFacts
    quarantined: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """Sentences for `summary.json`; the body has shown them."""


@dataclass(frozen=True)
class StageSpec:
    """One stage of one run: where it writes and what it depends on."""

    name: str
    directory: Path
    config: dict[str, Any]
    """The settings that change the output, and nothing else."""
    inputs: dict[str, str]
    """Artifact ids and source fingerprints by name."""
    body: Callable[[Path], StageOutput]
    """Writes into the scratch directory it is given."""
    resume_without: frozenset[str] = frozenset()
    """Inputs that may differ when an interrupted stage goes on from its `resume/` folder."""
    more_inputs: Callable[[], dict[str, str]] | None = None
    """Inputs that take long to tell; who executes the stage asks for them once."""

    @property
    def artifact_id(self) -> str:
        """Identity of what this stage would produce."""
        return artifact_id(self.name, config_hash(self.config), self.inputs)

    @property
    def resume_identity(self) -> str:
        """Identity of unfinished work that this stage can go on with."""
        inputs = {k: v for k, v in self.inputs.items() if k not in self.resume_without}
        return artifact_id(self.name, config_hash(self.config), inputs)

    def completed(self) -> "StageSpec":
        """The same execution with all its inputs."""
        if self.more_inputs is None:
            return self
        return replace(self, inputs=self.inputs | self.more_inputs(), more_inputs=None)

    @property
    def is_current(self) -> bool:
        """Whether the published artifact is what this stage would produce, with all its files."""
        manifest = read_manifest(self.directory)
        return (
            manifest is not None
            and manifest.artifact_id == self.artifact_id
            and not damaged_files(self.directory, thorough=False)
        )


@dataclass(frozen=True)
class StageRecord:
    """One row of the final table and of `summary.json`."""

    name: str
    status: str
    """`ran` or `current`."""
    manifest: Manifest[StageFacts]


class Failure(StrictConfig):
    """Why a stage failed; version 1."""

    schema_version: Literal[1] = 1
    stage: str
    error: str


def failure_file(directory: Path) -> Path:
    """Where a failed stage leaves its reason for `braid status`."""
    return directory.parent / f".{directory.name}.failed.json"


def running_file(directory: Path) -> Path:
    """Where a stage that is running says so for `braid status`; a killed one leaves it behind."""
    return directory.parent / f".{directory.name}.running.json"


def running_since(directory: Path, by: Holder) -> str | None:
    """When the process that holds the output directory began with a stage; None: it did not."""
    try:
        note = Holder.model_validate_json(running_file(directory).read_text())
    except (OSError, ValidationError):
        return None
    return note.since if (note.pid, note.host) == (by.pid, by.host) else None


@contextmanager
def _recorded(spec: StageSpec) -> Iterator[None]:
    """A failure of the block leaves its reason for `braid status`."""
    try:
        yield
    except BaseException as error:
        failure = failure_file(spec.directory)
        failure.parent.mkdir(parents=True, exist_ok=True)
        reason = user_error(error) or last_line(error)
        failed = Failure(stage=spec.name, error=str(reason))
        write_durably(failure, failed.model_dump_json())
        raise


@contextmanager
def _noted(spec: StageSpec) -> Iterator[None]:
    note = running_file(spec.directory)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_durably(note, this_process(spec.name).model_dump_json())
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def failure_of(directory: Path) -> str | None:
    """Why the last execution of a stage failed; None where it did not."""
    path = failure_file(directory)
    if not path.exists():
        return None
    try:
        return Failure.model_validate_json(path.read_text()).error
    except (OSError, ValidationError):
        return f"{path} cannot be read, so nobody knows why; the log of that run says it"


def execute(spec: StageSpec, reporter: Reporter, *, anew: bool = False) -> StageRecord:
    """Run a stage unless its artifact is current. A failure leaves nothing half-visible.

    Args:
        spec: the stage.
        reporter: shows it.
        anew: run it even so.
    """
    finish_interrupted(spec.directory)
    failure, started = failure_file(spec.directory), time.monotonic()
    if spec.more_inputs is not None:
        with _recorded(spec), reporter.stage(spec.name), _noted(spec):
            spec = spec.completed()
    if spec.is_current and not anew:
        failure.unlink(missing_ok=True)
        published = read_manifest(spec.directory)
        assert published is not None
        reporter.line(f"[dim]=[/] {spec.name:<9} current ({published.artifact_id})")
        return StageRecord(spec.name, "current", published)
    aside = abandoned(spec.directory, spec.resume_identity)
    if aside is not None:
        reporter.line(
            f"[yellow]![/] {spec.name} starts anew: its settings or inputs changed since it was "
            f"interrupted; the unfinished work lies in {escape(str(aside))}"
        )
    with (
        _recorded(spec),
        reporter.stage(spec.name),
        _noted(spec),
        writing(spec.directory, spec.resume_identity) as scratch,
    ):
        output = spec.body(scratch)
        manifest: Manifest[StageFacts] = publish(
            scratch,
            spec.directory,
            Manifest(
                stage=spec.name,
                artifact_id=spec.artifact_id,
                config_hash=config_hash(spec.config),
                inputs=spec.inputs,
                rows_in=output.rows_in,
                rows_out=output.rows_out,
                quarantined=output.quarantined,
                facts=output.facts,
                warnings=output.warnings,
                seconds=time.monotonic() - started,
            ),
        )
    failure.unlink(missing_ok=True)
    rows = f"{human(manifest.rows_in)} rows -> {human(manifest.rows_out)}"
    put_aside = sum(manifest.quarantined.values())
    if put_aside:
        rows += f", [yellow]{human(put_aside)} quarantined[/]"
    reporter.line(f"[green]+[/] {spec.name:<9} {duration(manifest.seconds):>7}  {rows}")
    return StageRecord(spec.name, "ran", manifest)

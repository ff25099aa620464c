"""What the stages that train say of their models; imports nothing heavy."""

from pathlib import Path
from typing import Literal

from embedding.warm_start_report import WarmStartReport
from pipeline.artifacts import Manifest, StageFacts, read_manifest
from pipeline.event_files import DayFiles
from pipeline.samples.columns import ColumnKind
from pipeline.stages import CATCH_UP


class TrainResult(StageFacts):
    """Rank 0's account of a finished training; of a study's trial, all there is. Version 1."""

    schema_version: Literal[1] = 1
    checkpoint: str
    """Directory name of the checkpoint that is the result: the best validation's, else the last."""
    rows: int
    """Real rows, all epochs."""
    steps: int
    best_step: int | None
    """Step of the result, chosen by validation; None without validation."""
    stopped_early: bool
    rows_per_s: float
    """Over all steps of the training, those before a restart included."""
    world_size: int
    data_wait_share: float
    warm_start: WarmStartReport | None
    """What came from the parent and what did not; None without."""
    content: dict[str, float] | None = None
    """Of the last window of steps: cost, age of the bank, norms of gradients; None without."""


class TrainingFacts(StageFacts):
    """What `train` and `catch_up` both say of their model."""

    result: TrainResult
    days: tuple[str, ...]
    """That it was trained on."""
    codebooks: str | None
    """Of the codes in its samples; None without codes."""
    event_columns: dict[str, ColumnKind]
    """What the id columns of the log held."""


class TrainFacts(TrainingFacts):
    """What `train` did.

    Where no step was worth keeping, days and files are those of the parent, which the model is.
    """

    parent: str | None
    """Date of the run whose model it started from."""
    day_files: dict[str, DayFiles]
    """Of each of the days, as ingest found them: what came later is not in the samples."""
    caught_up: str | None
    """Artifact id of the `catch_up` whose result it is; None: it trained by itself."""


class CatchUpFacts(TrainingFacts):
    """What `catch_up` did."""

    accepted: bool
    """Whether its result may be published."""
    reasons: tuple[str, ...]
    """Why not."""


def read_training(directory: Path) -> Manifest[TrainingFacts] | None:
    """Of the artifact of either stage; None where there is none."""
    return read_manifest(directory, CatchUpFacts if directory.name == CATCH_UP else TrainFacts)

"""The publish stage: the bundle of a training that passed the gate.

Reads the train artifact's checkpoint; writes `bundle/`.
"""

from pathlib import Path

from deploy.bundle import Origin, write_bundle
from embedding.checkpoint_files import latest_step, step_directory
from embedding.errors import UserError
from pipeline.artifacts import read_manifest
from pipeline.codes.features import CODES_FILE
from pipeline.codes.paths import codes_directory
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.config import Recipe
from pipeline.registry import BUNDLE, PublishFacts
from pipeline.stages import StageOutput
from pipeline.train import CHECKPOINT
from pipeline.train_facts import read_training


def publish(recipe: Recipe, train: Path, scratch: Path) -> StageOutput:
    """Write the bundle; with fp32 tables, scoring it equals the trainer's predictions."""
    checkpoints = train / CHECKPOINT
    step = latest_step(checkpoints)
    assert step is not None, checkpoints
    manifest = read_training(train)
    assert manifest is not None
    trained = manifest.facts
    bundle = write_bundle(
        recipe,
        step_directory(checkpoints, step),
        scratch / BUNDLE,
        origin=Origin(
            event_columns=trained.event_columns,
            codebooks=trained.codebooks,
            codes=None if recipe.codes is None else _codes(train, trained.codebooks),
        ),
    )
    rows = sum(table.num_rows for table in bundle.tables.values())
    num_bytes = sum((scratch / BUNDLE / file).stat().st_size for file in bundle.files)
    facts = PublishFacts(training=train.name, learned_up_to=trained.days[-1], num_bytes=num_bytes)
    return StageOutput(rows, rows, facts)


def _codes(train: Path, codebooks: str | None) -> Path:
    """The codes of items that the run of a training made, or took.

    Raises:
        UserError: they are gone, or of other codebooks by now.
    """
    run = train.parent
    directory = codes_directory(run.parent, run.name)
    made = read_manifest(directory, QuantizeFacts)
    found = None if made is None else made.facts.codebooks
    if found != codebooks:
        raise UserError(
            f"{directory} holds codes of codebooks {found}, and {train} was trained on those of "
            f"{codebooks}, which a bundle needs; run `braid run --date {run.name}` again, which "
            "makes what has changed since then"
        )
    return directory / CODES_FILE

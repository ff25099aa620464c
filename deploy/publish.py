"""The publish stage: the bundle of a training that passed the gate.

Reads the train artifact's checkpoint; writes `bundle/`.
"""

from pathlib import Path

from deploy.bundle import write_bundle
from embedding.checkpoint_files import latest_step, step_directory
from pipeline.artifacts import read_manifest
from pipeline.config import Recipe
from pipeline.registry import BUNDLE
from pipeline.stages import StageOutput
from pipeline.train import CHECKPOINT


def publish(recipe: Recipe, train: Path, scratch: Path) -> StageOutput:
    """Write the bundle; with fp32 tables, scoring it equals the trainer's predictions."""
    checkpoints = train / CHECKPOINT
    step = latest_step(checkpoints)
    assert step is not None, checkpoints
    manifest = read_manifest(train)
    assert manifest is not None
    bundle = write_bundle(
        recipe,
        step_directory(checkpoints, step),
        scratch / BUNDLE,
        codebooks=manifest.facts.get("codebooks"),
    )
    rows = sum(table.num_rows for table in bundle.tables.values())
    num_bytes = sum((scratch / BUNDLE / file).stat().st_size for file in bundle.files)
    return StageOutput(rows_in=rows, rows_out=rows, facts={"bytes": num_bytes})

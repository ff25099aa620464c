"""Manifests of runs that trained a model, without anything that a model is made of."""

from pathlib import Path

from pipeline.artifacts import MANIFEST, Manifest, StageFacts, publish, writing
from pipeline.train_facts import TrainFacts
from tests.pipeline.stage_facts import decided, published, trained


def write_manifest(directory: Path, identity: str, facts: StageFacts, **inputs: str) -> None:
    """One artifact that holds its manifest only."""
    manifest = Manifest(
        stage=directory.name, artifact_id=identity, config_hash="c", inputs=inputs, facts=facts
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_text(manifest.model_dump_json())


def write_model(
    out: Path,
    day: str,
    *,
    parent: str | None = None,
    days: list[str] | None = None,
    passed: bool | None = True,
    version: str = "",
) -> None:
    """As if a day had been run up to its gate, and published where that passed.

    Args:
        out: output directory.
        day: date of the run.
        parent: date of the run it started from.
        days: trained on; default: its own.
        passed: what the gate decided; None: the run ended before.
        version: of the day's model, where there are several.
    """
    train = f"train-{day}{version}"
    inputs = {} if parent is None else {"parent": f"train-{parent}"}
    run, days = out / day, days or [day]
    write_manifest(run / "train", train, trained(days, parent), **inputs)
    if passed is None:
        return
    write_manifest(run / "evaluate", f"evaluate-{train}", StageFacts(), train=train)
    decision = decided() if passed else decided("it is bad")
    write_manifest(run / "gate", f"gate-{train}", decision, evaluate=f"evaluate-{train}")
    if not passed:
        return
    directory, identity = run / "publish", f"publish-{train}"
    with writing(directory, identity) as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_text(identity)
        manifest = Manifest(
            stage="publish",
            artifact_id=identity,
            config_hash="",
            inputs={"train": train},
            facts=published(days[-1]),
        )
        publish(scratch, directory, manifest)


def cut_off(train: Path) -> None:
    """A file of a training is shorter than it was."""
    path = train / MANIFEST
    manifest = Manifest[TrainFacts].model_validate_json(path.read_text())
    whole = {"checksums": {"weights": "0"}, "sizes": {"weights": 9}}
    path.write_text(manifest.model_copy(update=whole).model_dump_json())
    (train / "weights").write_text("cut off")

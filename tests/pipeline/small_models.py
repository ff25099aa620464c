"""Manifests of runs that trained a model, without anything that a model is made of."""

from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST, Manifest, publish, writing


def write_manifest(out: Path, day: str, stage: str, identity: str, **facts: Any) -> Manifest:
    """One artifact that holds its manifest only; `inputs` is no fact."""
    inputs = facts.pop("inputs", {})
    manifest = Manifest(
        stage=stage, artifact_id=identity, config_hash="c", inputs=inputs, facts=facts
    )
    directory = out / day / stage
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    return manifest


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
    write_manifest(out, day, "train", train, inputs=inputs, days=days or [day], parent=parent)
    if passed is None:
        return
    write_manifest(out, day, "evaluate", f"evaluate-{train}", inputs={"train": train})
    evaluated = {"evaluate": f"evaluate-{train}"}
    write_manifest(out, day, "gate", f"gate-{train}", inputs=evaluated, passed=passed, reasons=[])
    if not passed:
        return
    directory, identity = out / day / "publish", f"publish-{train}"
    with writing(directory, identity) as scratch:
        (scratch / "bundle").mkdir()
        (scratch / "bundle" / "weights").write_text(identity)
        manifest = Manifest(
            stage="publish",
            artifact_id=identity,
            config_hash="",
            inputs={"train": train},
            facts={"training": "train", "learned_up_to": (days or [day])[-1]},
        )
        publish(scratch, directory, manifest)

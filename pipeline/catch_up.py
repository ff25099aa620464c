"""The published model learns the newest days, too: which artifact that is, and whether it may.

A model must be evaluated on days that it has not seen, so the newest day is missing in whatever
passed the gate. With `publish.catch_up` it is trained on those days afterwards (as far as the run
goes, this is progressive validation: predict a day, then learn it). No rows are left that this last
step has not seen; what can be asked of it is that it has learned: no worse than before on the very
rows it was trained on, and calibrated on them as the gate demands. If not, the model that the gate
passed is published as it is.
"""

from pathlib import Path

from pipeline.artifacts import read_manifest
from pipeline.gate import RANKING, check, reasons_of
from pipeline.gate_config import GateConfig
from pipeline.stages import CATCH_UP
from pipeline.train_facts import CatchUpFacts
from ranking.task_metrics import TaskMetrics

TOLERANCE = 0.005
"""AUC and GAUC on rows that were just trained on may fall by so much: other tasks and dropout shift
them."""


def objections(
    gate: GateConfig, before: dict[str, TaskMetrics], after: dict[str, TaskMetrics]
) -> tuple[str, ...]:
    """Why a model that has learned the rows it was judged by is not to be published.

    Args:
        gate: rules of the run.
        before: metrics of the model that the gate passed, by task.
        after: those of the model that went on from it, on the same rows.
    """
    reasons: tuple[str, ...] = ()
    for where, rules in gate.by_path:
        reasons += reasons_of(check(rules, where, after[rules.task], None))
        for name in RANKING:
            was, now = getattr(before[rules.task], name), getattr(after[rules.task], name)
            if was is not None and now is not None and now < was - TOLERANCE:
                fall = f"fell from {was:.4f} to {now:.4f}"
                reasons += (f"{rules.task}: {name} on the rows it has learned {fall}",)
    return reasons


def training_to_publish(run: Path) -> Path:
    """The training whose model a run publishes: that which caught up, where it did.

    Args:
        run: OUT/DATE. A `catch_up` of an earlier training that lies there does not count.
    """
    caught_up, trained = read_manifest(run / CATCH_UP, CatchUpFacts), read_manifest(run / "train")
    if caught_up is None or trained is None or not caught_up.facts.accepted:
        return run / "train"
    return run / (CATCH_UP if caught_up.inputs["train"] == trained.artifact_id else "train")

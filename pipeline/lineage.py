"""Which earlier model a run starts from: the latest one that its gate passed and nobody withdrew.

One whose files are missing or cut off is passed over, with a warning. The days that a model which
is passed over was trained on are trained on again: a run trains on the days since those of its
parent.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.artifacts import Manifest, damaged_files, read_manifest
from pipeline.days import run_command
from pipeline.event_files import DayFiles
from pipeline.gate_decision import GateDecision
from pipeline.registry import spoiled_by
from pipeline.train_facts import TrainFacts

TRAIN = "train"


def parent_of(out: Path, date: str) -> str | None:
    """Date of the model that the run of a date starts from; None: none.

    It is the one that its training has started from, as long as that lies there and was not taken
    out of production. It may be cut off: a date that is not trained anew does not read it, and one
    that is takes another one (`whole_parent`).
    """
    trained = read_manifest(out / date / TRAIN, TrainFacts)
    if trained is None:
        return next_parent(out, date)
    day = trained.facts.parent
    if day is None:
        return None
    parent = read_manifest(out / day / TRAIN)
    is_there = parent is not None and parent.artifact_id == trained.inputs.get("parent")
    return day if is_there and spoiled_by(out, day) is None else next_parent(out, date)


def whole_parent(
    out: Path, date: str, parent: str | None, is_trained: Callable[[], bool]
) -> str | None:
    """The parent of a run, or the next one where the files of that are missing or cut off.

    Args:
        out: output directory.
        date: of the run.
        parent: `parent_of` it.
        is_trained: whether the run would leave its training as it is; asked only where it matters.
    """
    if parent is None or not _damage(out, parent) or is_trained():
        return parent
    return next_parent(out, date)


def next_parent(out: Path, before: str | None = None) -> str | None:
    """Date of the model that a run of `before` starts from, or a run of any later day; None: none.

    Args:
        out: output directory.
        before: date of the run; None: later than all that were run.
    """
    return next((day for day in _fit(out, before) if not _damage(out, day)), None)


def passed_over(out: Path, before: str, parent: str | None) -> Iterator[str]:
    """Sentences on models that a run would start from, were they whole, in place of its parent."""
    for day in _fit(out, before):
        if parent is not None and day <= parent:
            return
        damaged = _damage(out, day)
        if damaged:
            more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
            start = "drawn values" if parent is None else f"the model of {parent}"
            yield (
                f"{out / day / TRAIN / damaged[0]}{more} is missing or cut off, so this run starts "
                f"from {start}, not from that of {day}; {run_command(out, day)} makes it again"
            )


def _fit(out: Path, before: str | None) -> Iterator[str]:
    """Dates of models that a gate passed and nobody withdrew, the latest first."""
    found = (path.parts[-3] for path in out.glob(f"????-??-??/{TRAIN}/manifest.json"))
    for day in sorted(found, reverse=True):
        usable = (before is None or day < before) and passed_its_gate(out, day)
        if usable and spoiled_by(out, day) is None:
            yield day


def _damage(out: Path, day: str) -> list[str]:
    return damaged_files(out / day / TRAIN, thorough=False)


def passed_its_gate(out: Path, day: str) -> bool:
    """Whether the gate passed exactly the model of a day."""
    gate = gate_of(out, day)
    return gate is not None and gate.facts.passed


def gate_of(out: Path, day: str) -> Manifest[GateDecision] | None:
    """The gate that decided on exactly the model of a day; None: none has.

    A model that was trained anew and then not evaluated lies beside the decision on another one.
    """
    gate = read_manifest(out / day / "gate", GateDecision)
    evaluate = read_manifest(out / day / "evaluate")
    train = read_manifest(out / day / TRAIN)
    if gate is None or evaluate is None or train is None:
        return None
    of_this = (gate.inputs.get("evaluate"), evaluate.inputs.get(TRAIN))
    return gate if of_this == (evaluate.artifact_id, train.artifact_id) else None


def learned_days(train: Path) -> tuple[tuple[str, ...], dict[str, DayFiles]]:
    """The days that are in the weights of a training, and their event files."""
    manifest = read_manifest(train, TrainFacts)
    assert manifest is not None
    return manifest.facts.days, manifest.facts.day_files


def trained_codebooks(train: Path) -> str | None:
    """Whose codes the samples of a training had; None without codes."""
    manifest = read_manifest(train, TrainFacts)
    assert manifest is not None
    return manifest.facts.codebooks


def unlearned(days: Sequence[str], parent: str) -> str:
    """A sentence on a training that no step of has been worth keeping."""
    named = days[0] if len(days) == 1 else f"{days[0]} .. {days[-1]}"
    return (
        f"no step of this training did better on the held-out days than the model of {parent}, "
        f"which it started from, so its result is that model; later runs train on {named} again"
    )


def start_of_next_run(out: Path) -> str:
    """A sentence on what the next run starts from, for whoever changed what is in production."""
    day = next_parent(out)
    if day is None:
        return "the next run starts from no earlier model and trains on its whole window"
    last = read_manifest(out / day / TRAIN, TrainFacts)
    assert last is not None
    since = last.facts.days[-1]
    return f"the next run starts from the model of {day} and trains on the days after {since}"

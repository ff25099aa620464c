"""Published bundles of an output directory, and which of them is in production.

DIR/<date>/publish/          the bundle of that date; a new run of the date replaces it
DIR/models/<artifact id>/    every bundle that was ever promoted, with its metrics; never changed
DIR/production.json          all promotions and rollbacks; replacing it is the commit point
"""

import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.files import link_or_copy, sync, write_durably
from pipeline.artifacts import Manifest, StageFacts, read_manifest
from pipeline.days import parse_day
from pipeline.lock import changing
from pipeline.promotions import Promotion, Promotions
from pipeline.train_facts import TrainFacts

PRODUCTION = "production.json"
MODELS = "models"
BUNDLE = "bundle"


class PublishFacts(StageFacts):
    """What was published."""

    training: str
    """The stage whose model it is: `train` or `catch_up`."""
    learned_up_to: str
    """The last day that the model was trained on."""
    num_bytes: int
    """Of the bundle."""


class PublishedModel(StrictConfig):
    """A published bundle."""

    date: str
    directory: Path
    manifest: Manifest[PublishFacts]

    @property
    def bundle(self) -> Path:
        """What can be served."""
        return self.directory / BUNDLE


def published(out: Path) -> list[PublishedModel]:
    """Bundles by date, of one date by age: all that were ever promoted, and those of every run.

    A promoted one is that in DIR/models, which outlives its run.
    """
    found = {}
    for path in out.glob("????-??-??/publish/manifest.json"):
        manifest = read_manifest(path.parent, PublishFacts)
        if manifest is None:  # pruned at this moment
            continue
        found[manifest.artifact_id] = PublishedModel(
            date=path.parts[-3], directory=path.parent, manifest=manifest
        )
    for change in promotions(out).history:
        directory = out / MODELS / change.artifact_id
        manifest = read_manifest(directory, PublishFacts)
        if manifest is not None:
            found[change.artifact_id] = PublishedModel(
                date=change.date, directory=directory, manifest=manifest
            )
    return sorted(found.values(), key=lambda model: (model.date, model.manifest.created_at))


def bundle_of_run(out: Path, date: str) -> Path | None:
    """The bundle that the run of a date published, in DIR/models where it was promoted."""
    manifest = read_manifest(out / date / "publish")
    if manifest is None:
        return None
    kept = out / MODELS / manifest.artifact_id
    return (kept if kept.is_dir() else out / date / "publish") / BUNDLE


def promotions(out: Path) -> Promotions:
    """All changes so far."""
    path = out / PRODUCTION
    return Promotions.model_validate_json(path.read_text()) if path.exists() else Promotions()


def production(out: Path) -> PublishedModel | None:
    """The model in production, or None."""
    stack = promotions(out).in_force
    return _kept(out, stack[-1]) if stack else None


def require_production(out: Path) -> PublishedModel:
    """The model in production.

    Raises:
        UserError: There is none, or no such directory.
    """
    require_output(out)
    current = production(out)
    if current is None:
        raise UserError(
            f"no model of {out} is in production; `braid models list --out {out}` shows what is "
            "published, and `braid models promote` puts one into production"
        )
    return current


def production_before(out: Path, date: str) -> PublishedModel | None:
    """The model in force of the latest date before `date`: what a model of `date` would replace.

    One that was pruned does not count (`pipeline.prune` keeps those of the latest runs).
    """
    earlier = [
        change
        for change in promotions(out).in_force
        if change.date < date and (out / MODELS / change.artifact_id).is_dir()
    ]
    return _kept(out, earlier[-1]) if earlier else None


def promote(out: Path, date: str) -> PublishedModel:
    """Put a published bundle into production; a no-op when it is there already.

    Of several of a date it is the one that its run has published, or the latest of those that were
    promoted where the run is gone.

    Raises:
        UserError: Nothing is published under that date, or it is none.
    """
    require_output(out)
    parse_day(date, "--date")
    with changing(out / PRODUCTION):
        return _promote(out, date)


def promote_newest(out: Path, date: str) -> str | None:
    """Promote the bundle of a run that has just been published, as far as that is a step forward.

    A model that was withdrawn on purpose stays out, and so do those trained from it;
    one of an older day replaces none of a later one. Another one of the same day is replaced, by
    one that it had replaced itself, too: whoever goes back to earlier settings wants their model,
    and the other one is withdrawn.

    Returns:
        Why it is not in production; None where it is.
    """
    manifest = read_manifest(out / date / "publish")
    assert manifest is not None
    with changing(out / PRODUCTION):
        past = promotions(out)
        if past.in_force and past.in_force[-1].artifact_id == manifest.artifact_id:
            return None
        spoiled = date if past.is_withdrawn(manifest.artifact_id) else spoiled_by(out, date)
        if spoiled is not None:
            which = (
                "it" if spoiled == date else f"the model of {spoiled}, which it was trained from,"
            )
            return f"{which} was withdrawn from production"
        if past.in_force and past.in_force[-1].date > date:
            return f"production is of {past.in_force[-1].date}"
        _promote(out, date)
    return None


def spoiled_by(out: Path, day: str) -> str | None:
    """Date of the model that makes the one of a day unfit to build on; None: nothing is known.

    That is itself, where it was withdrawn (`Promotions.withdrawn`), or a model that
    it was trained from, as far back as their artifacts are there. One that is in force is fit,
    whatever it was trained from: it was promoted after that was withdrawn.
    """
    approved, withdrawn = _trainings(out)
    manifest = read_manifest(out / day / "train", TrainFacts)
    while manifest is not None:
        parent, start = manifest.facts.parent, manifest.inputs.get("parent")
        for training in (manifest.artifact_id, start):
            if training in approved:
                return None
            if training in withdrawn:
                return withdrawn[training]
        manifest = None if parent is None else read_manifest(out / parent / "train", TrainFacts)
        if manifest is not None and manifest.artifact_id != start:
            return None  # the parent was trained anew since then
    return None


def was_withdrawn(out: Path, stage: str, artifact_id: str) -> bool:
    """Whether a bundle that was made of an artifact of a stage was withdrawn, and none approved."""

    def made_of_it(changes: Iterable[Promotion]) -> bool:
        manifests = (read_manifest(out / MODELS / change.artifact_id) for change in changes)
        return any(m is not None and m.inputs.get(stage) == artifact_id for m in manifests)

    past = promotions(out)
    return made_of_it(past.withdrawn) and not made_of_it(past.approved)


def _trainings(out: Path) -> tuple[set[str], dict[str, str]]:
    """Artifact ids of trainings whose bundles are approved, or were withdrawn, with their dates."""
    past = promotions(out)
    withdrawn = {change.train: change.date for change in past.withdrawn}
    return {change.train for change in past.approved}, withdrawn


def rollback(out: Path, say: Callable[[str], None] = lambda _: None) -> PublishedModel:
    """Return to the bundle that was in production before and is not known to be bad.

    Args:
        out: output directory.
        say: told which ones are passed over.

    Raises:
        UserError: There is no earlier promotion.
    """
    require_output(out)
    with changing(out / PRODUCTION):
        past = promotions(out)
        after = past.taken_back(_now())
        if not after.in_force:
            raise UserError(
                f"{out} has {len(past.in_force)} promotion(s) in force and none to return to, so "
                "there is nothing to roll back to; choose a bundle with `braid models promote "
                f"--out {out} --date DATE`"
            )
        current = _kept(out, after.in_force[-1])
        _write(out, after)
        for change in after.history[len(past.history) + 1 :]:
            say(f"passed over: the model of {change.date}, which was withdrawn from production")
        return current


def require_output(out: Path) -> None:
    """Mistyped directories are not created.

    Raises:
        UserError: There is no such directory.
    """
    if not out.is_dir():
        raise UserError(f"--out {out} is no directory; name the output directory of a run")


def _promote(out: Path, date: str) -> PublishedModel:
    of_run = read_manifest(out / date / "publish")
    bundles = published(out)
    of_date = {m.manifest.artifact_id: m for m in bundles if m.date == date}
    if not of_date:
        known = ", ".join(dict.fromkeys(m.date for m in bundles)) or "none"
        raise UserError(
            f"--date {date}: no published bundle in {out} (published are: {known}); run "
            "`braid run` for that date first"
        )
    *_, latest = of_date.values()
    model = latest if of_run is None else of_date.get(of_run.artifact_id, latest)
    past = promotions(out)
    identity = model.manifest.artifact_id
    kept = out / MODELS / identity
    if not kept.exists():
        _link(model, kept)
    if not (past.in_force and past.in_force[-1].artifact_id == identity):
        train = model.manifest.inputs["train"]
        entry = Promotion(date=date, artifact_id=identity, at=_now(), train=train)
        _write(out, past.promoted(entry))
    current = production(out)
    assert current is not None
    return current


def _kept(out: Path, change: Promotion) -> PublishedModel:
    directory = out / MODELS / change.artifact_id
    manifest = read_manifest(directory, PublishFacts)
    if manifest is None:
        raise UserError(
            f"the bundle of {change.date} ({change.artifact_id}) is no longer in {out / MODELS}; "
            f"restore it, or choose another one with `braid models promote --out {out} --date DATE`"
        )
    return PublishedModel(date=change.date, directory=directory, manifest=manifest)


def _link(model: PublishedModel, target: Path) -> None:
    """The same files under a second name, visible in one move, on disk before it is promoted."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model.directory, partial, copy_function=link_or_copy)
    if read_manifest(partial, PublishFacts) != model.manifest:
        raise UserError(
            f"{model.directory} was published anew at this moment; run the same command again"
        )
    for path in (*partial.rglob("*"), partial):
        sync(path)
    partial.rename(target)
    sync(target.parent)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(out: Path, value: Promotions) -> None:
    write_durably(out / PRODUCTION, value.model_dump_json(indent=2))

"""Published bundles of an output directory, and which of them is in production.

DIR/<date>/publish/          the bundle of that date; a new run of the date replaces it
DIR/models/<artifact id>/    every bundle that was ever promoted, with its metrics; never changed
DIR/production.json          all promotions and rollbacks; replacing it is the commit point
"""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.links import link_or_copy
from pipeline.artifacts import Manifest, read_manifest, write_durably
from pipeline.lock import changing

PRODUCTION = "production.json"
MODELS = "models"
BUNDLE = "bundle"


class Promotion(StrictConfig):
    """One change of what is in production."""

    date: str
    artifact_id: str
    """Of the bundle: promoted, or, in a rollback, taken back."""
    at: str
    rollback: bool = False


class Promotions(StrictConfig):
    """All changes, oldest first; version 2."""

    schema_version: Literal[2] = 2
    history: tuple[Promotion, ...] = ()

    @property
    def in_force(self) -> list[Promotion]:
        """Promotions that were not taken back; the last one is in production."""
        stack: list[Promotion] = []
        for change in self.history:
            if change.rollback:
                stack.pop()
            else:
                stack.append(change)
        return stack

    def ever_promoted(self, artifact_id: str) -> bool:
        """Whether the bundle was in production at some time."""
        return any(change.artifact_id == artifact_id for change in self.history)


class PublishedModel(StrictConfig):
    """A published bundle."""

    date: str
    directory: Path
    manifest: Manifest

    @property
    def bundle(self) -> Path:
        """What can be served."""
        return self.directory / BUNDLE


def published(out: Path) -> list[PublishedModel]:
    """The bundle of every date, oldest first."""
    models = []
    for path in sorted(out.glob("????-??-??/publish/manifest.json")):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        models.append(PublishedModel(date=path.parts[-3], directory=path.parent, manifest=manifest))
    return models


def promotions(out: Path) -> Promotions:
    """All changes so far."""
    path = out / PRODUCTION
    return Promotions.model_validate_json(path.read_text()) if path.exists() else Promotions()


def production(out: Path) -> PublishedModel | None:
    """The model in production, or None."""
    stack = promotions(out).in_force
    return _kept(out, stack[-1]) if stack else None


def production_before(out: Path, date: str) -> PublishedModel | None:
    """The model in force of the latest date before `date`: what a model of `date` would replace."""
    earlier = [change for change in promotions(out).in_force if change.date < date]
    return _kept(out, earlier[-1]) if earlier else None


def promote(out: Path, date: str) -> PublishedModel:
    """Put a published bundle into production; a no-op when it is there already.

    Raises:
        UserError: Nothing is published under that date.
    """
    require_output(out)
    with changing(out / PRODUCTION):
        return _promote(out, date)


def promote_newest(out: Path, date: str) -> str | None:
    """Promote the bundle of a run that has just been published, as far as that is a step forward.

    A bundle that was rolled back on purpose stays rolled back, and one of an older day replaces
    none of a later one.

    Returns:
        The date in production, where a model of a later one is in force; else None.
    """
    manifest = read_manifest(out / date / "publish")
    assert manifest is not None
    with changing(out / PRODUCTION):
        past = promotions(out)
        if past.ever_promoted(manifest.artifact_id):
            return None
        if any(change.date > date for change in past.in_force):
            return past.in_force[-1].date
        _promote(out, date)
    return None


def rollback(out: Path) -> PublishedModel:
    """Return to the bundle that was in production before.

    Raises:
        UserError: There is no earlier promotion.
    """
    require_output(out)
    with changing(out / PRODUCTION):
        past = promotions(out)
        stack = past.in_force
        if len(stack) < 2:
            raise UserError(
                f"{out} has {len(stack)} promotion(s), so there is nothing to roll back to; "
                f"choose a bundle with `braid models promote --out {out} --date DATE`"
            )
        entry = stack[-1].model_copy(update={"rollback": True, "at": _now()})
        _kept(out, stack[-2])
        _write(out, Promotions(history=(*past.history, entry)))
        current = production(out)
        assert current is not None
        return current


def require_output(out: Path) -> None:
    """Mistyped directories are not created.

    Raises:
        UserError: There is no such directory.
    """
    if not out.is_dir():
        raise UserError(f"--out {out} is no directory; name the output directory of a run")


def _promote(out: Path, date: str) -> PublishedModel:
    models = {model.date: model for model in published(out)}
    if date not in models:
        known = ", ".join(models) or "none"
        raise UserError(
            f"--date {date}: no published bundle in {out} (published are: {known}); run "
            "`braid run` for that date first"
        )
    model = models[date]
    past = promotions(out)
    identity = model.manifest.artifact_id
    kept = out / MODELS / identity
    if not kept.exists():
        _link(model, kept)
    if not (past.in_force and past.in_force[-1].artifact_id == identity):
        entry = Promotion(date=date, artifact_id=identity, at=_now())
        _write(out, Promotions(history=(*past.history, entry)))
    current = production(out)
    assert current is not None
    return current


def _kept(out: Path, change: Promotion) -> PublishedModel:
    directory = out / MODELS / change.artifact_id
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(
            f"the bundle of {change.date} ({change.artifact_id}) is no longer in {out / MODELS}; "
            f"restore it, or choose another one with `braid models promote --out {out} --date DATE`"
        )
    return PublishedModel(date=change.date, directory=directory, manifest=manifest)


def _link(model: PublishedModel, target: Path) -> None:
    """The same files under a second name, visible in one move."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model.directory, partial, copy_function=link_or_copy)
    if read_manifest(partial) != model.manifest:
        raise UserError(
            f"{model.directory} was published anew at this moment; run the same command again"
        )
    partial.rename(target)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(out: Path, value: Promotions) -> None:
    write_durably(out / PRODUCTION, value.model_dump_json(indent=2))

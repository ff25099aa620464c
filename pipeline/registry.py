"""Published bundles of an output directory, and which of them is in production.

`DIR/production.json` holds the history of promotions, newest last; replacing that file is the
commit point, so readers see the old bundle or the new one and nothing in between.
"""

from datetime import UTC, datetime
from pathlib import Path

from embedding.config import StrictConfig
from embedding.errors import UserError
from pipeline.artifacts import Manifest, read_manifest

PRODUCTION = "production.json"
BUNDLE = "bundle"


class Promotion(StrictConfig):
    """One bundle put into production."""

    date: str
    artifact_id: str
    promoted_at: str


class Promotions(StrictConfig):
    """All promotions, oldest first; version 1."""

    schema_version: int = 1
    history: tuple[Promotion, ...] = ()


class PublishedModel(StrictConfig):
    """A published bundle."""

    date: str
    bundle: Path
    evaluation: Path
    manifest: Manifest


def published(out: Path) -> list[PublishedModel]:
    """All published bundles, oldest date first."""
    models = []
    for path in sorted(out.glob("????-??-??/publish/manifest.json")):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        models.append(
            PublishedModel(
                date=path.parts[-3],
                bundle=path.parent / BUNDLE,
                evaluation=path.parents[1] / "evaluate",
                manifest=manifest,
            )
        )
    return models


def promotions(out: Path) -> Promotions:
    """The promotions so far."""
    path = out / PRODUCTION
    return Promotions.model_validate_json(path.read_text()) if path.exists() else Promotions()


def production(out: Path) -> PublishedModel | None:
    """The model in production, or None."""
    history = promotions(out).history
    models = {model.date: model for model in published(out)}
    return models.get(history[-1].date) if history else None


def promote(out: Path, date: str) -> PublishedModel:
    """Put a published bundle into production; a no-op when it is there already.

    Raises:
        UserError: Nothing is published under that date.
    """
    models = {model.date: model for model in published(out)}
    if date not in models:
        known = ", ".join(models) or "none"
        raise UserError(
            f"--date {date}: no published bundle in {out} (published are: {known}); run "
            "`braid run` for that date first"
        )
    model = models[date]
    past = promotions(out)
    if past.history and past.history[-1].artifact_id == model.manifest.artifact_id:
        return model
    entry = Promotion(
        date=date,
        artifact_id=model.manifest.artifact_id,
        promoted_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _write(out, Promotions(history=(*past.history, entry)))
    return model


def rollback(out: Path) -> PublishedModel:
    """Return to the bundle that was in production before.

    Raises:
        UserError: There is no earlier promotion.
    """
    past = promotions(out)
    if len(past.history) < 2:
        raise UserError(
            f"{out} has {len(past.history)} promotion(s), so there is nothing to roll back to; "
            "choose a bundle with `braid models promote`"
        )
    _write(out, Promotions(history=past.history[:-1]))
    model = production(out)
    if model is None:
        _write(out, past)
        raise UserError(
            f"the bundle of {past.history[-2].date} is no longer in {out}; choose another one with "
            "`braid models promote`"
        )
    return model


def _write(out: Path, value: Promotions) -> None:
    partial = out / f"{PRODUCTION}.partial"
    partial.write_text(value.model_dump_json(indent=2))
    partial.replace(out / PRODUCTION)

"""Which days a run trains on when it starts from an earlier one and holds days out."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedding.errors import UserError
from pipeline import run as run_module
from pipeline import training_stages
from pipeline.artifacts import MANIFEST, Manifest, StageFacts, config_hash, read_manifest
from pipeline.command import Command
from pipeline.config import PublishConfig, Recipe, WindowConfig
from pipeline.consent import Consent
from pipeline.console import Reporter
from pipeline.day_warnings import Ancestry, day_warnings
from pipeline.days import catalogue_files, fingerprint
from pipeline.identity import ingest_config, publish_config, training_config
from pipeline.recipe import load_recipe
from pipeline.registry import promote, rollback
from pipeline.run import DayRun
from pipeline.samples import ingest as ingest_module
from pipeline.samples.join import SAMPLES
from pipeline.spans import first_day_held
from pipeline.stages import STAGES, StageSpec, execute
from tests.pipeline import stage_facts
from tests.pipeline.small_log import (
    DAYS,
    event,
    make_recipe,
    run_here,
    write_catalogue,
    write_day,
)
from tests.pipeline.small_models import cut_off, write_model

AS_IS = Consent()


def _run(tmp_path: Path, trained: list[str], window: WindowConfig) -> DayRun:
    """The run of the third day, after one of the second day that trained on `trained`."""
    for day in DAYS:
        (tmp_path / "data" / "events" / f"dt={day}").mkdir(parents=True)
    write_model(tmp_path / "out", DAYS[1], days=trained)
    return _run_of_third_day(tmp_path, window)


def _run_of_third_day(tmp_path: Path, window: WindowConfig) -> DayRun:
    recipe = make_recipe(tmp_path / "data").model_copy(update={"window": window})
    return DayRun(
        recipe,
        tmp_path / "out",
        DAYS[2],
        session=None,
        reporter=Reporter(),
        publish=lambda *_: None,
    )


def test_a_day_held_out_yesterday_is_trained_today(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:1], WindowConfig(validation_days=1))

    assert run.training_days() == (DAYS[1],)
    assert run.split.validation == (DAYS[2],)


def test_without_held_out_days_only_the_new_one_is_trained(tmp_path: Path) -> None:
    assert _run(tmp_path, DAYS[:2], WindowConfig()).training_days() == (DAYS[2],)


def test_a_parent_that_trained_on_everything_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:2], WindowConfig(validation_days=1))

    with pytest.raises(UserError, match=rf"days up to {DAYS[1]}.*window.warm_start=false"):
        run.training_days()


def test_a_cold_start_trains_on_the_whole_window(tmp_path: Path) -> None:
    run = _run(tmp_path, DAYS[:2], WindowConfig(validation_days=1, warm_start=False))

    assert run.training_days() == tuple(DAYS[:2])


def test_a_refused_model_is_nobodys_parent(tmp_path: Path) -> None:
    assert _run(tmp_path, DAYS[:2], WindowConfig()).parent == DAYS[1]
    write_model(tmp_path / "out", DAYS[1], days=DAYS[:2], passed=False)

    run = _run_of_third_day(tmp_path, WindowConfig())
    assert run.parent is None
    assert run.training_days() == tuple(DAYS[:3]), "its day is trained by the next model"


def test_days_of_a_model_that_was_rolled_back_are_trained_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run(tmp_path, DAYS[1:2], WindowConfig())
    write_model(out, DAYS[0])
    promote(out, DAYS[0])
    promote(out, DAYS[1])
    going_on = _run_of_third_day(tmp_path, WindowConfig())
    assert going_on.training_days() == (DAYS[2],)
    write_model(out, DAYS[2], parent=DAYS[1])
    rollback(out)

    assert going_on.training_days() == (DAYS[2],), "its stages go on with the same spans"
    run = _run_of_third_day(tmp_path, WindowConfig())
    assert run.parent == DAYS[0], "though it was trained from the other one before"
    assert run.training_days() == tuple(DAYS[1:3])


def test_a_cut_off_parent_is_left_where_the_day_is_trained_anew(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day, before in enumerate([None, DAYS[0]]):
        ingested(run_of(root, day))
        write_model(out, DAYS[day], parent=before)
    done = run_of(root, 2)
    ingested(done)
    joined(done)
    write_manifest(next(done.specs("plan")), StageFacts())
    write_manifest(next(done.specs("train")), stage_facts.trained([DAYS[2]], DAYS[1]))
    cut_off(out / DAYS[1] / "train")

    def run_with(recipe: Recipe) -> tuple[DayRun, tuple[str, ...]]:
        command = Command(recipe, out, publish=lambda *_: None)
        return command._day(DAYS[2]), command.progress.warnings

    again, warnings = run_with(done.recipe)
    assert (again.parent, warnings) == (DAYS[1], ()), "it is done, and reads no parent"
    ranking = done.recipe.ranking
    trainer = ranking.trainer.model_copy(update={"seed": 9})
    other = ranking.model_copy(update={"trainer": trainer})
    anew, (warning,) = run_with(done.recipe.model_copy(update={"ranking": other}))
    assert (anew.parent, anew.training_days()) == (DAYS[0], tuple(DAYS[1:3]))
    assert f"starts from the model of {DAYS[0]}, not from that of {DAYS[1]}" in warning


def test_how_often_a_training_reports_does_not_make_it_stale() -> None:
    recipe = load_recipe("demo")
    busier = load_recipe("demo", ["ranking.trainer.log_every_steps=1", "cluster.max_failures=9"])
    larger = load_recipe("demo", ["ranking.trainer.epochs=9"])

    assert training_config(busier) == training_config(recipe)
    assert training_config(larger) != training_config(recipe)


def test_how_a_bundle_holds_its_tables_concerns_the_publish_stage_alone(tmp_path: Path) -> None:
    write_log(tmp_path / "data", 3)

    def stages(tables: str) -> dict[str, list[str]]:
        run = run_of(tmp_path / "data", 1)
        run.recipe = run.recipe.model_copy(update={"publish": PublishConfig(tables=tables)})
        ingested(run)
        return {name: [spec.artifact_id for spec in run.specs(name)] for name in STAGES}

    fp32, int8 = stages("fp32"), stages("int8")
    assert [name for name in STAGES if fp32[name] != int8[name]] == ["publish"]
    recipe = load_recipe("demo")
    assert publish_config(recipe) == {}, "what earlier versions published stays current"


def run_of(root: Path, day: int, consent: Consent = AS_IS, **window: Any) -> DayRun:
    return DayRun(
        make_recipe(root).model_copy(update={"window": WindowConfig(**window)}),
        root.parent / "out",
        DAYS[day],
        session=None,
        reporter=Reporter(),
        publish=lambda *_: None,
        consent=consent,
    )


def write_log(root: Path, num_days: int) -> None:
    write_catalogue(root)
    for day in range(num_days):
        write_day(root, day, [[event(day, 1, 60)]])


def deliver_late(root: Path, day: int) -> None:
    """Another file of a day."""
    folder = root / "events" / f"dt={DAYS[day]}"
    (folder / "part-00009.parquet").write_bytes((folder / "part-00000.parquet").read_bytes())


def ingested(run: DayRun) -> list[tuple[str, bool]]:
    """Last days of the spans, and whether each was current; afterwards all of them are."""
    found = []
    for spec in run.specs("ingest"):
        last = spec.directory.parent.name
        found.append((last, spec.is_current))
        if spec.is_current:
            continue
        span = run.spans.span(last)
        before = None if span.previous is None else run.directory("ingest", span.previous)
        first = first_day_held(span.days, before)
        facts = stage_facts.ingested(span.days, span.previous, first, run.recipe.data.root)
        write_manifest(spec.completed(), facts)
    return found


def joined(run: DayRun) -> None:
    """As if join had run: a file for every day of every span."""
    for span in (*run.training_spans(), *run.evaluation_spans()):
        for day in span.days:
            folder = run.directory("join", span.days[-1]) / SAMPLES / f"dt={day}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "bucket-0000.parquet").touch()
    for spec in run.specs("join"):
        write_manifest(spec, StageFacts())


def test_a_day_that_was_missed_is_trained_on_by_the_next_run(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    write_model(tmp_path / "out", DAYS[0])

    assert run_of(root, 2).training_days() == (DAYS[1], DAYS[2])
    assert run_of(root, 2, train_days=1).training_days() == (DAYS[2],), "outside of the window"


def test_a_day_without_its_marker_is_neither_trained_nor_evaluated_on(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    for day in DAYS[:3]:
        (root / "events" / f"dt={day}" / "_SUCCESS").touch()
    recipe = make_recipe(root, complete_marker="_SUCCESS")

    def run(day: str) -> DayRun:
        sources = {"session": None, "reporter": Reporter(), "publish": lambda *_: None}
        return DayRun(recipe, tmp_path / "out", day, **sources)

    assert run(DAYS[1]).split.evaluation == (DAYS[2],)
    with pytest.raises(UserError, match=f"no later day to evaluate on.* is {DAYS[1]}"):
        run(DAYS[2])
    with pytest.raises(UserError, match="holds no file _SUCCESS"):
        run(DAYS[3])


def test_what_is_ingested_anew_is_said(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    for day in range(3):
        ingested(run_of(root, day))
    spans = run_of(root, 2).spans
    assert [spans.cascade(spans.span(day)) for day in DAYS] == [[]] * 4
    deliver_late(root, 1)

    assert spans.cascade(spans.span(DAYS[1])) == [
        f"event files of {DAYS[1]} changed since they were ingested: it is ingested anew, and so "
        f"are the 2 spans after it, up to {DAYS[3]}"
    ]
    assert spans.cascade(spans.span(DAYS[2])) == [], "said once"


def test_a_file_that_came_late_makes_its_span_and_the_ones_after_it_stale(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 3)

    assert ingested(run_of(root, 0)) == [(DAYS[0], False), (DAYS[1], False)]
    assert ingested(run_of(root, 1)) == [(DAYS[0], True), (DAYS[1], True), (DAYS[2], False)]
    deliver_late(root, 0)

    stale = [(DAYS[0], False), (DAYS[1], False), (DAYS[2], False)]
    assert ingested(run_of(root, 1)) == stale


def test_a_file_that_comes_between_ingest_and_training_was_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 3)
    run = run_of(root, 0)
    run.session = SimpleNamespace(wait_for=lambda *_: None, group=tuple)
    ingested(run)
    joined(run)
    monkeypatch.setattr(training_stages, "train", lambda *_: stage_facts.RESULT)
    deliver_late(root, 0)
    execute(next(run.specs("train")), run.reporter)

    next_day = run_of(root, 1)
    assert ingested(next_day) == [(day, False) for day in DAYS[:3]]
    ancestry = Ancestry.of(out, DAYS[0])
    (sentence,) = day_warnings(next_day.spans.known_days, next_day.split, (DAYS[1],), ancestry)
    assert f"the files of {DAYS[0]} have changed since models" in sentence


def test_a_log_that_was_copied_makes_nothing_stale(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    for day in range(2):
        ingested(run_of(root, day))
    for file in root.rglob("*.parquet"):
        os.utime(file, ns=(1, 1))

    run = run_of(root, 1)
    assert ingested(run) == [(day, True) for day in DAYS[:3]]
    assert run.spans.cascade(run.spans.span(DAYS[1])) == []


def test_a_day_of_a_longer_span_that_changed_is_named(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    ingested(run_of(root, 2))
    deliver_late(root, 1)

    spans = run_of(root, 2).spans
    assert spans.cascade(spans.span(DAYS[2])) == [
        f"event files of {DAYS[1]} changed since they were ingested: the span {DAYS[0]} .. "
        f"{DAYS[2]} is ingested anew, and so is the span after it, up to {DAYS[3]}"
    ]


def test_nobody_reads_files_to_tell_that_a_span_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 2)
    (spec, *_) = run_of(root, 0).specs("ingest")

    assert "events" not in spec.inputs
    assert not spec.is_current
    assert "events" in spec.completed().inputs


def test_every_evaluation_day_is_found_whichever_span_holds_it(tmp_path: Path) -> None:
    """The day before ingested the first of the two in a span that begins at this run's date."""
    root = tmp_path / "data"
    write_log(root, 4)
    ingested(run_of(root, 0, eval_days=2))
    run = run_of(root, 1, eval_days=2)

    assert ingested(run) == [
        *((DAYS[0], True), (DAYS[1], False)),  # up to the date
        *((DAYS[2], True), (DAYS[3], False)),
    ]
    assert [span.days for span in run.evaluation_spans()] == [(DAYS[1], DAYS[2]), (DAYS[3],)]
    joined(run)
    where = [(path.parts[-5], path.parts[-2]) for path in run.evaluation_samples()]
    assert where == [(day, f"dt={day}") for day in DAYS[2:]]
    training = [path.parts[-5] for path in run.samples((DAYS[1],))]
    assert training == [DAYS[1]], "not once more from the span of evaluation days"
    (evaluate,) = run.specs("evaluate")
    assert {evaluate.inputs["join"], evaluate.inputs[f"join:{DAYS[2]}"]} == {
        read_manifest(run.directory("join", day)).artifact_id for day in DAYS[2:]
    }


def test_a_span_goes_on_with_the_one_it_continued(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    ingested(run_of(root, 0, eval_days=2))
    ingested(run_of(root, 1, eval_days=2))
    deliver_late(root, 0)

    run = run_of(root, 1, eval_days=2)
    assert ingested(run) == [(day, False) for day in DAYS]
    assert [span.days for span in run.evaluation_spans()] == [(DAYS[1], DAYS[2]), (DAYS[3],)]


def test_a_catalogue_that_grew_is_joined_and_makes_nothing_published_stale(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    first = run_of(root, 0)
    ingested(first)
    joined(first)
    assert [spec.is_current for spec in first.specs("join")] == [True, True]
    write_catalogue(root, num_items=9)
    run = run_of(root, 1)

    assert ingested(run) == [(DAYS[0], True), (DAYS[1], True), (DAYS[2], False)]
    assert [spec.is_current for spec in run.specs("join")] == [True, True, False]
    assert [spec.is_current for spec in first.specs("join")] == [True, True]
    again = run_of(root, 1, consent=Consent(refresh_catalogue=True))
    assert [spec.is_current for spec in again.specs("ingest")] == [True, True, True]
    assert [spec.is_current for spec in again.specs("join")] == [False, False, False]
    deliver_late(root, 1)
    assert ingested(run) == [(DAYS[0], True), (DAYS[1], False), (DAYS[2], False)]
    ingests = [read_manifest(run.directory("ingest", day)) for day in DAYS[:3]]
    old, *new = [manifest.inputs["catalogue"] for manifest in ingests]
    assert new == [fingerprint(catalogue_files(root))] * 2
    assert old not in new


def test_a_training_goes_on_after_the_catalogue_was_rewritten(tmp_path: Path) -> None:
    """Its identity is that of the interrupted one, and so are those of all stages before it."""
    root = tmp_path / "data"
    write_log(root, 3)
    run = run_of(root, 1)
    ingested(run)
    joined(run)
    (before,) = run.specs("train")
    write_catalogue(root, num_items=9)

    (after,) = run_of(root, 1).specs("train")
    assert after.resume_identity == before.resume_identity
    refreshed = run_of(root, 1, consent=Consent(refresh_catalogue=True))
    joined(refreshed)
    (other,) = refreshed.specs("train")
    assert other.resume_identity != before.resume_identity


def test_what_was_read_while_the_catalogue_changed_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    write_log(root, 2)
    monkeypatch.setattr(ingest_module, "stream_tasks", run_here)
    run = run_of(root, 0)
    run.session = SimpleNamespace(wait_for=lambda *_: None)

    def and_export(*arguments: Any) -> Any:
        facts = ingest_module.ingest(*arguments)
        write_catalogue(root, num_items=9)
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "ingest", and_export)
        with pytest.raises(UserError, match=r"items.parquet or users.parquet .* while ingest read"):
            execute(next(run.specs("ingest")), run.reporter)
    assert read_manifest(run.directory("ingest")) is None
    assert execute(next(run.specs("ingest")), run.reporter).status == "ran"


def test_a_published_span_outlives_its_events_and_the_artifacts_before_it(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    ingested(run_of(root, 0))
    ingested(run_of(root, 1))
    shutil.rmtree(root / "events" / f"dt={DAYS[0]}")

    run = run_of(root, 2)
    assert ingested(run) == [(DAYS[0], True), (DAYS[1], True), (DAYS[2], True), (DAYS[3], False)]
    shutil.rmtree(out / DAYS[0])
    run = run_of(root, 2)
    assert ingested(run) == [(day, True) for day in DAYS[1:]]
    assert [span.days for span in run.training_spans()] == [(DAYS[1],), (DAYS[2],)]


def test_an_artifact_that_was_removed_is_made_again_only_for_its_days(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    ingested(run_of(root, 2))
    shutil.rmtree(out / DAYS[2])  # of three days
    ingested(run_of(root, 1))
    ingested(run_of(root, 2))
    before = read_manifest(out / DAYS[2] / "ingest")
    shutil.rmtree(out / DAYS[1])

    assert ingested(run_of(root, 2, train_days=1)) == [(DAYS[2], True), (DAYS[3], True)]
    again = [(DAYS[1], False), (DAYS[2], True), (DAYS[3], True)]
    assert ingested(run_of(root, 2, train_days=2)) == again
    assert read_manifest(out / DAYS[2] / "ingest") == before


def test_events_that_nothing_holds_any_more_are_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    ingested(run_of(root, 0))
    ingested(run_of(root, 1))
    ingested(run_of(root, 2))
    shutil.rmtree(root / "events" / f"dt={DAYS[1]}")
    shutil.rmtree(tmp_path / "out" / DAYS[1])

    with pytest.raises(UserError, match=rf"{DAYS[1]}/ingest is gone, and so are the days"):
        ingested(run_of(root, 2, train_days=3))


def changed(run: DayRun, **consent: bool) -> DayRun:
    """The same run with another feature of the events."""
    features = run.recipe.features
    more = features.sparse[5].model_copy(update={"name": "hour", "column": "hour"})
    other = features.model_copy(update={"sparse": (*features.sparse, more)})
    return DayRun(
        run.recipe.model_copy(update={"features": other}),
        run.out,
        run.date,
        session=run.session,
        reporter=run.reporter,
        publish=run.publish,
        consent=Consent(**consent),
    )


def test_histories_whose_events_are_gone_are_cut_only_where_the_user_says_so(
    tmp_path: Path,
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day in range(3):
        ingested(run_of(root, day))
    for day in DAYS[:2]:
        shutil.rmtree(root / "events" / f"dt={day}")
    kept = read_manifest(out / DAYS[2] / "ingest")

    refusal = (
        rf"{DAYS[2]}/ingest would be made anew from {DAYS[2]} on.*go back to {DAYS[0]}, and .*"
        r"no longer has all days since then\. Restore these days.*--shorter-histories"
    )
    with pytest.raises(UserError, match=refusal):
        ingested(changed(run_of(root, 2)))
    assert read_manifest(out / DAYS[2] / "ingest") == kept
    assert ingested(run_of(root, 2))[-1] == (DAYS[3], True), "the settings before go on"

    agreed = changed(run_of(root, 2), shorter_histories=True)
    assert ingested(agreed) == [(DAYS[2], False), (DAYS[3], False)]
    assert agreed.spans.span(DAYS[2]).previous is None
    assert ingested(changed(run_of(root, 2))) == [(DAYS[2], True), (DAYS[3], True)], "said once"


def test_histories_begin_anew_where_the_log_has_all_events(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 3)
    ingested(run_of(root, 1))

    assert ingested(changed(run_of(root, 1))) == [(DAYS[1], False), (DAYS[2], False)]


def test_a_span_stays_once_the_one_that_it_goes_on_with_is_pruned(tmp_path: Path) -> None:
    """A late file would have the whole log ingested."""
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day in range(3):
        ingested(run_of(root, day))
    shutil.rmtree(out / DAYS[0])
    deliver_late(root, 1)

    run = run_of(root, 2, train_days=2)
    assert ingested(run) == [(day, True) for day in DAYS[1:]]
    assert run.spans.cascade(run.spans.span(DAYS[1])) == []
    assert list(run.spans.kept(DAYS[2])) == [
        f"event files of {DAYS[1]} are not those that {out / DAYS[1]}/ingest was made of, which "
        f"stays as it is, because {out / DAYS[0]}/ingest, which it goes on with, is pruned or "
        f"deleted; to take them in, delete {out / DAYS[1]}/ingest and, with all days since "
        f"{DAYS[0]} in {root}/events, run `braid run --date {DAYS[1]} --out {out}` with this recipe"
    ]
    shutil.rmtree(out / DAYS[1] / "ingest")
    again = run_of(root, 2, train_days=2)
    assert ingested(again) == [(day, False) for day in DAYS[1:]]
    assert again.spans.span(DAYS[1]).days == (DAYS[0], DAYS[1])
    assert again.spans.kept(DAYS[2]) == {}


def test_a_span_that_stays_is_made_again_by_the_run_that_the_sentence_names(
    tmp_path: Path,
) -> None:
    """A warm-started run of a later day needs no day of it, so it could not make it again."""
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day, before in enumerate([None, *DAYS[:2]]):
        ingested(run_of(root, day))
        write_model(out, DAYS[day], parent=before)
    shutil.rmtree(out / DAYS[0])
    deliver_late(root, 1)

    nightly = run_of(root, 2)
    assert nightly.training_days() == (DAYS[2],)
    (sentence,) = nightly.spans.kept(DAYS[2])
    assert f"run `braid run --date {DAYS[1]} --out {out}` with this recipe" in sentence
    shutil.rmtree(out / DAYS[1] / "ingest")
    assert DAYS[1] not in dict(ingested(run_of(root, 2))), "it is not what the sentence names"
    assert ingested(run_of(root, 1)) == [(DAYS[1], False), (DAYS[2], False)]
    assert ingested(run_of(root, 2)) == [(DAYS[1], True), (DAYS[2], True), (DAYS[3], False)]
    assert run_of(root, 2).spans.kept(DAYS[2]) == {}


def test_a_span_that_goes_on_with_one_of_other_settings_says_so(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day in range(3):
        ingested(run_of(root, day))
    assert ingested(changed(run_of(root, 0))) == [(day, False) for day in DAYS[:2]]
    deliver_late(root, 2)

    run = run_of(root, 2, train_days=1)
    (sentence,) = run.spans.kept(DAYS[2])
    why = "which it goes on with, was made again with other settings; to take them in"
    assert f"because {out / DAYS[1]}/ingest, {why}" in sentence
    shutil.rmtree(out / DAYS[2] / "ingest")
    assert ingested(run)[0] == (DAYS[2], False), "the command that the sentence names"
    assert run.spans.kept(DAYS[2]) == {}


def test_a_span_of_days_that_are_deleted_names_them(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 3)
    ingested(run_of(root, 1))
    shutil.rmtree(root / "events" / f"dt={DAYS[0]}")
    deliver_late(root, 1)

    (sentence,) = run_of(root, 1).spans.kept(DAYS[1])
    assert f"stays as it is, because the event log no longer has {DAYS[0]}; to take" in sentence


def test_a_training_says_which_span_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    ingested(run_of(root, 0))
    monkeypatch.setattr(training_stages, "train", lambda *_: stage_facts.RESULT)

    def warnings(day: int, train_days: int) -> tuple[str, ...]:
        run = run_of(root, day, train_days=train_days)
        run.session = SimpleNamespace(wait_for=lambda *_: None, group=tuple)
        ingested(run)
        joined(run)
        execute(next(run.specs("train")), run.reporter)
        manifest = read_manifest(run.directory("train"))
        assert manifest is not None
        return manifest.warnings

    assert warnings(1, train_days=1) == ()
    shutil.rmtree(out / DAYS[0])
    deliver_late(root, 1)
    shutil.rmtree(out / DAYS[1] / "train")
    (sentence,) = warnings(1, train_days=1)
    assert f"{out / DAYS[1]}/ingest was made of, which stays as it is" in sentence

    write_model(out, DAYS[1])  # before the file came
    assert warnings(2, train_days=2) == (sentence,), "to run the day again would change nothing"
    shutil.rmtree(out / DAYS[1] / "ingest")
    ingested(run_of(root, 1))
    shutil.rmtree(out / DAYS[2] / "train")
    (sentence,) = warnings(2, train_days=2)
    assert f"run the days from {DAYS[1]} on again (braid backfill)" in sentence, "now it does"


def test_a_late_file_cuts_no_history_whose_artifact_is_gone(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    write_log(root, 4)
    for day in range(3):
        ingested(run_of(root, day))
    shutil.rmtree(root / "events" / f"dt={DAYS[0]}")
    shutil.rmtree(out / DAYS[0])
    assert all(current for _, current in ingested(run_of(root, 2)))
    deliver_late(root, 1)

    run = run_of(root, 2)
    assert all(current for _, current in ingested(run))
    (sentence,) = run.spans.kept(DAYS[2])
    assert f"with all days since {DAYS[0]} in" in sentence
    shutil.rmtree(out / DAYS[1] / "ingest")
    with pytest.raises(UserError, match=rf"there go back to {DAYS[0]}, and"):
        ingested(run_of(root, 2, train_days=2))


def test_columns_of_items_and_limits_leave_histories_as_they_are() -> None:
    recipe = make_recipe(Path("data"))
    features = recipe.features
    weight = features.dense[1].model_copy(update={"name": "height", "column": "height"})
    more = features.model_copy(update={"dense": (*features.dense, weight)})
    wider = recipe.model_copy(update={"features": more})
    price = features.dense[0].model_copy(update={"name": "tax", "column": "tax"})
    other = features.model_copy(update={"dense": (*features.dense, price)})

    known = ingest_config(recipe)
    assert ingest_config(wider) == known
    assert ingest_config(make_recipe(Path("data"), max_quarantined_share=0.9)) == known
    assert ingest_config(make_recipe(Path("data"), user_buckets=9)) != known, "other files"
    assert ingest_config(recipe.model_copy(update={"features": other})) != known
    shorter = features.histories[0].model_copy(update={"max_length": 1})
    cut = features.model_copy(update={"histories": (shorter, features.histories[1])})
    assert ingest_config(recipe.model_copy(update={"features": cut})) != known


def test_a_day_that_came_too_late_for_every_span_is_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in (1, 2, 3):
        write_day(root, day, [[event(day, 1, 60)]])
    ingested(run_of(root, 1))
    ingested(run_of(root, 2))
    shutil.rmtree(root / "events" / f"dt={DAYS[1]}")
    write_day(root, 0, [[event(0, 1, 60)]])

    remedy = f"braid run --date {DAYS[1]} --out .* or move dt={DAYS[0]} away"
    with pytest.raises(UserError, match=rf"has {DAYS[0]}, which came after .*{remedy}"):
        ingested(run_of(root, 2))
    assert all(current for _, current in ingested(run_of(root, 2, train_days=1)))


def test_days_that_no_span_holds_are_not_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_log(root, 4)
    run = run_of(root, 0)
    ingested(run)

    with pytest.raises(AssertionError, match=DAYS[3]):
        run.samples((DAYS[1], DAYS[3]))


def write_manifest(spec: StageSpec, facts: StageFacts) -> None:
    """As if the stage had run."""
    spec.directory.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        stage=spec.name,
        artifact_id=spec.artifact_id,
        config_hash=config_hash(spec.config),
        inputs=spec.inputs,
        facts=facts,
    )
    (spec.directory / MANIFEST).write_text(manifest.model_dump_json())

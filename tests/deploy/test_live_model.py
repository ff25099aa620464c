"""What is served is what is in production, scored as offline, and nothing interrupts it."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.app import main
from deploy.serving import live_model
from deploy.serving.batches import Asked, score_together
from deploy.serving.live_model import LiveModel, ModelSource
from deploy.serving.scorer import kept_sources
from deploy.serving.wire import ScoreRequest
from embedding.errors import UserError
from embedding.files import file_sha256
from pipeline.registry import production, promote, rollback
from pipeline.samples.lookup import no_entities
from tests.deploy.refusal import refused
from tests.deploy.served import ingested, publish_days, request_of
from tests.pipeline.small_log import DAYS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_days(tmp_path_factory.mktemp("days"))


@pytest.fixture
def out(days: Path, tmp_path: Path) -> Path:
    """A copy of them, with the catalogue, that a test may change."""
    shutil.copytree(days, tmp_path / "runs")
    shutil.copytree(days.parent / "data", tmp_path / "data")
    return tmp_path / "runs"


@pytest.fixture
def live(out: Path) -> Iterator[LiveModel]:
    live = LiveModel(ModelSource(out=out, data=out.parent / "data"))
    yield live
    live.close()


def asked(live: LiveModel, body: dict) -> Asked:
    loaded = live.now
    return Asked(loaded, loaded.scorer.rows(ScoreRequest.model_validate(body), now_ms=0))


def test_served_probabilities_equal_those_of_offline_scoring(
    out: Path, live: LiveModel, tmp_path: Path
) -> None:
    model = production(out)
    assert model is not None
    samples, scores = out / DAYS[2] / "join", tmp_path / "scores.parquet"
    command = ["score", "--bundle", str(model.bundle), "--samples", str(samples)]
    assert main([*command, "-o", str(scores)]) == 0

    served = score_together([asked(live, request_of(row)) for row in ingested(out)])

    expected = pq.read_table(scores)["probability:click"].to_numpy()
    assert len(expected) == 90
    assert len(set(expected)) > 10
    found = torch.cat([one.probs_BT[:, 0] for one in served if not isinstance(one, Exception)])
    torch.testing.assert_close(found, torch.from_numpy(expected.copy()), atol=1e-6, rtol=0)


def test_ids_that_the_catalogue_lacks_are_scored_and_counted(out: Path, live: LiveModel) -> None:
    row = ingested(out)[0]

    (known,) = score_together([asked(live, request_of(row, [1, 77, 2, 78]))])
    (strange,) = score_together([asked(live, request_of({**row, "user_id": 99}))])

    assert not isinstance(known, Exception)
    assert not isinstance(strange, Exception)
    assert (known.unknown_candidates, known.unknown_user) == (2, False)
    assert known.probs_BT.isfinite().all()
    assert (strange.unknown_candidates, strange.unknown_user) == (0, True)


def test_a_promoted_model_is_served_from_the_next_look_on(out: Path, live: LiveModel) -> None:
    row = ingested(out)[3]
    before = asked(live, request_of(row))
    rollback(out)

    assert live.refresh()

    after = asked(live, request_of(row))
    assert [one.loaded.model.date for one in (before, after)] == [DAYS[1], DAYS[0]]
    ((newer,), (older,)) = (score_together([one]) for one in (before, after))  # by its own model
    assert not isinstance(newer, Exception)
    assert not isinstance(older, Exception)
    assert not torch.equal(newer.probs_BT, older.probs_BT)
    alone = LiveModel(ModelSource(bundle=Path(after.loaded.model.bundle), data=out.parent / "data"))
    (own,) = score_together([asked(alone, request_of(row))])
    assert not isinstance(own, Exception)
    torch.testing.assert_close(own.probs_BT, older.probs_BT)
    assert not live.refresh()  # nothing new


def test_a_model_that_cannot_be_loaded_leaves_the_present_one_in_place(
    out: Path, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = promote(out, DAYS[0])
    table = next((older.bundle / "tables").iterdir())
    sound = table.read_bytes()
    table.unlink()  # a link to what the run published
    table.write_bytes(sound[:-1])
    refreshed_s = live.refreshed_s

    assert not live.refresh()

    assert (live.num_failures, live.refreshed_s) == (1, refreshed_s)
    assert live.now.model.date == DAYS[1]
    assert live.state.last_error is not None
    assert "missing or damaged" in live.state.last_error
    (scores,) = score_together([asked(live, request_of(ingested(out)[0]))])
    assert not isinstance(scores, Exception)
    table.write_bytes(sound)
    assert not live.refresh(), "the same is tried again after a pause"
    monkeypatch.setattr(live._tries["model"], "_at_s", 0.0)
    assert live.refresh()
    assert live.state.last_error is None
    assert live.refreshed_s > refreshed_s
    assert live.state.model.date == DAYS[0]


def test_a_rewritten_catalogue_is_read_and_the_bundle_is_kept(out: Path, live: LiveModel) -> None:
    items = out.parent / "data" / "items.parquet"
    before = live.now
    row = request_of(ingested(out)[0], [1, 50])
    table = pq.read_table(items)
    new = table.slice(0, 1).set_column(0, "item_id", [[50]])
    pq.write_table(table.from_batches([*table.to_batches(), *new.to_batches()]), items)

    assert live.refresh()

    (scores,) = score_together([asked(live, row)])
    assert not isinstance(scores, Exception)
    assert scores.unknown_candidates == 0
    assert live.now.predictor is before.predictor


def test_items_of_the_present_model_go_on_while_a_newer_one_does_not_load(
    out: Path, live: LiveModel
) -> None:
    older = promote(out, DAYS[0])
    table = next((older.bundle / "tables").iterdir())
    table.unlink()
    items = out.parent / "data" / "items.parquet"
    rows = pq.read_table(items)
    pq.write_table(rows.slice(0, 3), items)

    assert live.refresh()

    (scores,) = score_together([asked(live, request_of(ingested(out)[0], [1, 4]))])
    assert not isinstance(scores, Exception)
    assert (live.now.model.date, scores.unknown_candidates) == (DAYS[1], 1)
    assert "missing or damaged" in (live.state.last_error or "")


def replace_bundle(bundle: Path, by: Path) -> None:
    shutil.rmtree(bundle)
    shutil.copytree(by, bundle)


def test_a_bundle_that_is_replaced_in_its_place_is_loaded_whole(out: Path, tmp_path: Path) -> None:
    newer, older = (promote(out, day).bundle for day in (DAYS[1], DAYS[0]))
    bundle = tmp_path / "bundle"
    shutil.copytree(newer, bundle)
    live = LiveModel(ModelSource(bundle=bundle, data=out.parent / "data"))
    row = request_of(ingested(out)[3])
    before = live.now
    replace_bundle(bundle, older)

    assert live.refresh()

    assert live.now.model.artifact_id != before.model.artifact_id
    (found,) = score_together([asked(live, row)])
    alone = LiveModel(ModelSource(bundle=older, data=out.parent / "data"))
    (own,) = score_together([asked(alone, row)])
    assert not isinstance(found, Exception)
    assert not isinstance(own, Exception)
    torch.testing.assert_close(found.probs_BT, own.probs_BT)
    assert alone.now.model.artifact_id == live.now.model.artifact_id
    assert not live.refresh()


def test_a_catalogue_is_read_for_the_loaded_bundle_whatever_lies_in_its_place(
    out: Path, tmp_path: Path
) -> None:
    bundle, items = tmp_path / "bundle", out.parent / "data" / "items.parquet"
    shutil.copytree(promote(out, DAYS[1]).bundle, bundle)
    live = LiveModel(ModelSource(bundle=bundle, data=items.parent))
    before = live.now
    replace_bundle(bundle, promote(out, DAYS[0]).bundle)
    (bundle / "dense.safetensors").unlink()
    pq.write_table(pq.read_table(items).slice(0, 3), items)

    assert live.refresh()

    assert "missing or damaged" in (live.state.last_error or "")
    assert (live.now.model, live.now.predictor) == (before.model, before.predictor)
    assert live.now.scorer.sources.recipe.name == before.scorer.sources.recipe.name
    (found,) = score_together([asked(live, request_of(ingested(out)[0], [1, 4]))])
    assert not isinstance(found, Exception)
    assert found.unknown_candidates == 1


def test_a_model_that_scores_nothing_finite_is_not_served(out: Path, live: LiveModel) -> None:
    older = promote(out, DAYS[0])
    dense = older.bundle / "dense.safetensors"
    weights = {name: torch.full_like(w, torch.nan) for name, w in load_file(dense).items()}
    dense.unlink()
    save_file(weights, dense)
    told = older.bundle / "bundle.json"
    bundle = json.loads(told.read_text())
    bundle["files"]["dense.safetensors"] = file_sha256(dense)
    told.unlink()
    told.write_text(json.dumps(bundle))

    assert not live.refresh()

    assert "not finite" in (live.state.last_error or "")


def test_a_catalogue_that_is_damaged_is_not_served(out: Path, live: LiveModel) -> None:
    items = out.parent / "data" / "items.parquet"
    before = live.now
    items.write_bytes(b"half of a file")
    os.utime(items, (1, 1))

    assert not live.refresh()

    assert live.now is before
    assert "items.parquet" in (live.state.last_error or "")


def test_a_damaged_catalogue_keeps_no_model_from_production(out: Path, live: LiveModel) -> None:
    items = out.parent / "data" / "items.parquet"
    sound = items.read_bytes()
    row = request_of(ingested(out)[3])
    alone = LiveModel(ModelSource(bundle=promote(out, DAYS[0]).bundle, data=items.parent))
    (expected,) = score_together([asked(alone, row)])
    items.write_bytes(b"half of a file")

    assert live.refresh()

    assert live.now.model.date == DAYS[0]
    assert "items.parquet" in (live.state.last_error or "")
    (found,) = score_together([asked(live, row)])
    assert not isinstance(found, Exception)
    assert not isinstance(expected, Exception)
    assert torch.equal(found.probs_BT, expected.probs_BT)
    assert found.unknown_candidates == 0
    assert not live.refresh()
    assert "items.parquet" in (live.state.last_error or "")
    items.write_bytes(sound)
    assert live.refresh(), "one that was mended is tried at once"
    assert live.state.last_error is None


def test_a_model_that_waits_for_a_mended_catalogue_is_tried_at_once(
    out: Path, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads more of the catalogue than the one before has in memory."""
    items = out.parent / "data" / "items.parquet"
    sound = items.read_bytes()
    sources = live.now.scorer.sources
    bundle, root = live.now.predictor.bundle, sources.recipe.data.root
    assert kept_sources(bundle, root, sources) is not None
    assert kept_sources(bundle, root / "other", sources) is None
    less = {**sources.entities, "items": no_entities()}
    assert kept_sources(bundle, root, replace(sources, entities=less)) is None
    monkeypatch.setattr(live_model, "kept_sources", lambda *_: None)
    promote(out, DAYS[0])
    items.write_bytes(b"half of a file")
    assert not live.refresh()
    items.write_bytes(sound)

    assert live.refresh()

    assert (live.now.model.date, live.state.last_error) == (DAYS[0], None)


def test_the_pause_before_another_try_grows_and_ends_with_what_changes(
    out: Path, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def fail(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError("no memory")

    monkeypatch.setattr(live_model, "Predictor", fail)
    now = 1000.0
    monkeypatch.setattr(live_model.time, "monotonic", lambda: now)
    promote(out, DAYS[0])

    tried_at = []
    for _ in range(400):
        before = tries
        live.refresh()
        tried_at += [now] * (tries - before)
        now += 5.0

    gaps = [b - a for a, b in pairwise(tried_at)]
    assert gaps[:3] == [10.0, 20.0, 40.0]
    assert max(gaps) == live_model.LONGEST_PAUSE_S
    promote(out, DAYS[1])
    live.refresh()  # the model that is served is in production again
    assert live.state.last_error is None


def test_watching_refreshes_in_the_background(out: Path, live: LiveModel) -> None:
    live.watch(0.01)
    rollback(out)

    until = time.monotonic() + 30
    while live.now.model.date != DAYS[0]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_breaks_one_request_does_not_break_its_batch(
    out: Path, live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [request_of(row) for row in ingested(out)[:3]]
    batch = [asked(live, row) for row in rows]
    scorer = live.now.scorer
    score = scorer.score
    broken = batch[1].rows

    def break_one(requests: list) -> list:
        if any(one is broken for one in requests):
            raise ZeroDivisionError
        return score(requests)

    monkeypatch.setattr(scorer, "score", break_one)

    found = score_together(batch)

    assert [isinstance(one, ZeroDivisionError) for one in found] == [False, True, False]


@pytest.mark.parametrize("options", [[], ["--out", "{out}", "--bundle", "{out}"]])
def test_a_service_needs_an_output_directory_or_a_bundle(
    out: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    said = refused(capsys, main(["serve", *(o.format(out=out) for o in options)]))

    assert "either an output directory" in said


@pytest.mark.parametrize("route", ["scores", "/a/", "/{user}", "//"])
def test_a_route_that_serve_cannot_have_is_refused(
    out: Path, capsys: pytest.CaptureFixture[str], route: str
) -> None:
    said = refused(capsys, main(["serve", "--out", str(out), "--route", route]))

    assert f"--route={route}: " in said


def test_on_a_cluster_paths_are_absolute(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.chdir(out.parent)

    said = refused(capsys, main(["serve", "--out", out.name, "--data", str(out.parent / "data")]))

    assert f"--out={out.name} is relative" in said


def test_a_port_that_is_taken_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(capsys, main(["serve", "--out", str(out), "--port", str(port)]))

    assert f"--port {port} cannot be listened on" in said


def test_nothing_in_production_is_refused_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, main(["serve", "--out", str(tmp_path)]))

    assert "is in production" in said


def test_a_bundle_without_its_catalogue_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, main(["serve", "--out", str(out), "--data", str(tmp_path / "no")]))

    assert "items.parquet does not exist" in said
    assert "--data" in said


def test_a_source_is_checked_where_it_is_made(out: Path) -> None:
    with pytest.raises(UserError, match="is in production"):
        live_model.LiveModel(ModelSource(out=out.parent))

"""Which model the next run starts from, after refusals, crashes and rollbacks."""

from pathlib import Path

import pytest

from deploy.app import main
from pipeline.artifacts import read_manifest
from pipeline.lineage import next_parent, parent_of, passed_over, whole_parent
from pipeline.registry import (
    production,
    promote,
    promote_newest,
    promotions,
    rollback,
    was_withdrawn,
)
from tests.pipeline.small_log import DAYS
from tests.pipeline.small_models import cut_off, write_manifest, write_model
from tests.pipeline.stage_facts import trained


def write_days(out: Path) -> None:
    """Three days, each trained from the one before, published and promoted."""
    for before, day in zip([None, *DAYS[:2]], DAYS[:3], strict=True):
        write_model(out, day, parent=before)
        promote(out, day)


def test_the_latest_model_that_passed_is_started_from(tmp_path: Path) -> None:
    write_days(tmp_path)

    assert next_parent(tmp_path) == DAYS[2]
    assert next_parent(tmp_path, DAYS[2]) == DAYS[1]
    assert next_parent(tmp_path, DAYS[0]) is None


def test_a_model_that_no_gate_passed_is_passed_over(tmp_path: Path) -> None:
    write_days(tmp_path)
    write_model(tmp_path, DAYS[3], parent=DAYS[2], passed=None)
    assert next_parent(tmp_path) == DAYS[2], "evaluate crashed, or never ran"

    write_model(tmp_path, DAYS[3], parent=DAYS[2], passed=False)
    assert next_parent(tmp_path) == DAYS[2]


def test_a_decision_on_an_earlier_model_of_the_day_does_not_count(tmp_path: Path) -> None:
    write_days(tmp_path)
    anew = trained([DAYS[2]], DAYS[1])
    write_manifest(tmp_path / DAYS[2] / "train", "trained anew", anew)

    assert next_parent(tmp_path) == DAYS[1]


def test_a_damaged_model_is_passed_over_and_named(tmp_path: Path) -> None:
    write_days(tmp_path)
    cut_off(tmp_path / DAYS[2] / "train")

    assert next_parent(tmp_path) == DAYS[1]
    (said,) = passed_over(tmp_path, DAYS[3], DAYS[1])
    assert said == (
        f"{tmp_path / DAYS[2] / 'train' / 'weights'} is missing or cut off, so this run starts "
        f"from the model of {DAYS[1]}, not from that of {DAYS[2]}; `braid run --date {DAYS[2]} "
        f"--out {tmp_path}` with this recipe makes it again"
    )
    assert not list(passed_over(tmp_path, DAYS[3], DAYS[2])), "trained from it when it was whole"
    for day in DAYS[:2]:
        cut_off(tmp_path / day / "train")
    assert next_parent(tmp_path) is None
    assert "from drawn values" in list(passed_over(tmp_path, DAYS[3], None))[-1]


def test_a_damaged_parent_is_left_where_the_day_is_trained_anew(tmp_path: Path) -> None:
    write_days(tmp_path)
    cut_off(tmp_path / DAYS[1] / "train")
    parent = parent_of(tmp_path, DAYS[2])
    assert parent == DAYS[1], "recorded"

    assert whole_parent(tmp_path, DAYS[2], parent, lambda: True) == DAYS[1]
    assert whole_parent(tmp_path, DAYS[2], parent, lambda: False) == DAYS[0]
    assert whole_parent(tmp_path, DAYS[1], DAYS[0], lambda: False) == DAYS[0], "it is whole"


def test_a_rolled_back_model_and_its_children_are_passed_over(tmp_path: Path) -> None:
    write_days(tmp_path)
    rollback(tmp_path)
    assert next_parent(tmp_path) == DAYS[1]
    write_model(tmp_path, DAYS[3], parent=DAYS[2])
    assert next_parent(tmp_path) == DAYS[1], "a run that was on its way at the rollback"

    assert promote_newest(tmp_path, DAYS[2]) == "it was withdrawn from production"
    why = promote_newest(tmp_path, DAYS[3])
    assert (
        why == f"the model of {DAYS[2]}, which it was trained from, was withdrawn from production"
    )
    assert production(tmp_path).date == DAYS[1]


def test_children_are_known_by_their_parent_when_its_folder_is_gone(tmp_path: Path) -> None:
    write_days(tmp_path)
    write_model(tmp_path, DAYS[3], parent=DAYS[2])
    rollback(tmp_path)
    (tmp_path / DAYS[2] / "train" / "manifest.json").unlink()

    assert next_parent(tmp_path) == DAYS[1]


def test_a_model_trained_anew_for_a_rolled_back_day_is_another_one(tmp_path: Path) -> None:
    write_days(tmp_path)
    rollback(tmp_path)
    write_model(tmp_path, DAYS[2], parent=DAYS[1], version="-mended")

    assert promote_newest(tmp_path, DAYS[2]) is None
    assert production(tmp_path).date == DAYS[2]
    assert next_parent(tmp_path) == DAYS[2]


def write_and_return(out: Path) -> None:
    """A model of another day before; then two of one day, and the first one of them again."""
    write_model(out, DAYS[0])
    promote(out, DAYS[0])
    for version in ("", "-bad", ""):
        write_model(out, DAYS[1], parent=DAYS[0], version=version)
        assert promote_newest(out, DAYS[1]) is None


def test_going_back_to_earlier_settings_puts_their_model_back(tmp_path: Path) -> None:
    write_and_return(tmp_path)
    past = promotions(tmp_path)
    assert production(tmp_path).manifest.artifact_id == f"publish-train-{DAYS[1]}"
    assert promote_newest(tmp_path, DAYS[1]) is None
    assert promotions(tmp_path) == past, "it is in production"
    assert [change.artifact_id for change in past.withdrawn] == [f"publish-train-{DAYS[1]}-bad"]
    assert next_parent(tmp_path) == DAYS[1]

    write_model(tmp_path, DAYS[1], parent=DAYS[0], version="-bad")
    assert promote_newest(tmp_path, DAYS[1]) == "it was withdrawn from production"
    assert next_parent(tmp_path) == DAYS[0]
    promote(tmp_path, DAYS[1])
    assert production(tmp_path).manifest.artifact_id == f"publish-train-{DAYS[1]}-bad"
    assert next_parent(tmp_path) == DAYS[1], "put back by hand"


def test_a_rollback_returns_to_no_model_whose_settings_were_given_up(tmp_path: Path) -> None:
    write_and_return(tmp_path)
    rollback(tmp_path)

    assert production(tmp_path).date == DAYS[0]
    assert next_parent(tmp_path) == DAYS[0]
    found = {change.artifact_id for change in promotions(tmp_path).withdrawn}
    assert found == {f"publish-train-{DAYS[1]}", f"publish-train-{DAYS[1]}-bad"}
    assert promote_newest(tmp_path, DAYS[1]) == "it was withdrawn from production"


def test_a_training_is_fit_as_long_as_one_of_its_bundles_is_approved(tmp_path: Path) -> None:
    """As where the settings of `publish` changed alone, and changed back."""
    write_model(tmp_path, DAYS[0])
    promote(tmp_path, DAYS[0])
    path = tmp_path / DAYS[0] / "publish" / "manifest.json"
    first = read_manifest(path.parent)
    for manifest in (first.model_copy(update={"artifact_id": "other"}), first):
        path.unlink()  # the kept bundle has the same file
        path.write_text(manifest.model_dump_json())
        promote(tmp_path, DAYS[0])

    assert promotions(tmp_path).is_withdrawn("other")
    assert not was_withdrawn(tmp_path, "train", f"train-{DAYS[0]}")
    assert next_parent(tmp_path) == DAYS[0]


def test_a_rolled_back_bundle_of_the_same_training_stays_out(tmp_path: Path) -> None:
    """As where the settings of `publish` changed alone."""
    write_model(tmp_path, DAYS[0])
    promote(tmp_path, DAYS[0])
    directory = tmp_path / DAYS[0] / "publish"
    other = read_manifest(directory).model_copy(update={"artifact_id": "other"})
    (directory / "manifest.json").unlink()  # the kept bundle has the same file
    (directory / "manifest.json").write_text(other.model_dump_json())
    promote(tmp_path, DAYS[0])
    rollback(tmp_path)

    assert promote_newest(tmp_path, DAYS[0]) == "it was withdrawn from production"
    assert production(tmp_path).manifest.artifact_id == f"publish-train-{DAYS[0]}"


def test_of_several_bundles_of_a_day_its_run_s_is_promoted(tmp_path: Path) -> None:
    """Also where one that was promoted before is older than another of that day."""
    for version in ("", "-bad", ""):
        write_model(tmp_path, DAYS[0], version=version)
        promote(tmp_path, DAYS[0])
    assert production(tmp_path).manifest.artifact_id == f"publish-train-{DAYS[0]}"


def test_a_model_that_was_replaced_by_a_later_one_is_said_to_be(tmp_path: Path) -> None:
    write_days(tmp_path)

    assert promote_newest(tmp_path, DAYS[0]) == f"production is of {DAYS[2]}"
    past = promotions(tmp_path)
    found = [past.is_superseded(f"publish-train-{day}") for day in DAYS[:3]]
    assert found == [True, True, False]
    promote(tmp_path, DAYS[0])
    assert not promotions(tmp_path).is_superseded(f"publish-train-{DAYS[1]}"), "withdrawn"


def test_promoting_an_earlier_day_takes_the_later_ones_back(tmp_path: Path) -> None:
    write_days(tmp_path)
    promote(tmp_path, DAYS[0])
    assert [change.date for change in promotions(tmp_path).withdrawn] == [DAYS[1], DAYS[2]]
    assert next_parent(tmp_path) == DAYS[0]

    promote(tmp_path, DAYS[1])
    assert next_parent(tmp_path) == DAYS[1], "put back by hand"
    rollback(tmp_path)
    assert next_parent(tmp_path) == DAYS[0]
    promote(tmp_path, DAYS[2])
    assert next_parent(tmp_path) == DAYS[2], "put back by hand, whatever it was trained from"


def test_a_promotion_by_mistake_is_undone_by_a_rollback(tmp_path: Path) -> None:
    write_days(tmp_path)
    promote(tmp_path, DAYS[0])
    rollback(tmp_path)

    assert production(tmp_path).date == DAYS[2]
    assert promotions(tmp_path).withdrawn == []
    assert promotions(tmp_path).is_superseded(f"publish-train-{DAYS[0]}")
    assert next_parent(tmp_path) == DAYS[2]
    write_model(tmp_path, DAYS[3], parent=DAYS[2])
    assert promote_newest(tmp_path, DAYS[3]) is None


def test_a_model_that_is_put_back_is_started_from_whatever_it_was_trained_from(
    tmp_path: Path,
) -> None:
    write_days(tmp_path)
    rollback(tmp_path)
    rollback(tmp_path)
    promote(tmp_path, DAYS[2])
    assert [change.date for change in promotions(tmp_path).withdrawn] == [DAYS[1]]
    assert next_parent(tmp_path) == DAYS[2]

    write_model(tmp_path, DAYS[3], parent=DAYS[2])
    assert promote_newest(tmp_path, DAYS[3]) is None
    rollback(tmp_path)
    rollback(tmp_path)
    assert production(tmp_path).date == DAYS[0]
    assert next_parent(tmp_path) == DAYS[0]


def test_a_rollback_that_is_undone_is_forgotten(tmp_path: Path) -> None:
    write_days(tmp_path)
    rollback(tmp_path)
    promote(tmp_path, DAYS[2])

    assert promotions(tmp_path).withdrawn == []
    assert next_parent(tmp_path) == DAYS[2]


def test_a_mended_day_is_promoted_where_later_models_are_withdrawn(tmp_path: Path) -> None:
    write_days(tmp_path)
    promote(tmp_path, DAYS[0])
    write_model(tmp_path, DAYS[1], parent=DAYS[0], version="-mended")

    assert promote_newest(tmp_path, DAYS[1]) is None
    assert production(tmp_path).date == DAYS[1]
    write_model(tmp_path, DAYS[0], version="-mended")
    assert promote_newest(tmp_path, DAYS[0]) == f"production is of {DAYS[1]}"


def test_no_rollback_returns_to_a_model_that_was_withdrawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_days(tmp_path)
    promote(tmp_path, DAYS[1])
    write_model(tmp_path, DAYS[3], parent=DAYS[1])
    promote_newest(tmp_path, DAYS[3])
    rollback(tmp_path)
    assert production(tmp_path).date == DAYS[1]

    assert main(["models", "rollback", "--out", str(tmp_path)]) == 0
    assert f"passed over: the model of {DAYS[2]}, which was withdrawn" in capsys.readouterr().out
    assert production(tmp_path).date == DAYS[0]
    assert next_parent(tmp_path) == DAYS[0]
    assert main(["models", "rollback", "--out", str(tmp_path)]) == 2


def test_a_rollback_says_what_the_next_run_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_days(tmp_path)

    assert main(["models", "rollback", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    start = f"starts from the model of {DAYS[1]} and trains on the days after {DAYS[1]}"
    assert f"the next run {start}" in said
    write_model(tmp_path, DAYS[0], passed=False, version="-2")
    write_model(tmp_path, DAYS[1], passed=False, version="-2")
    assert main(["models", "rollback", "--out", str(tmp_path)]) == 0
    assert "from no earlier model and trains on its whole window" in capsys.readouterr().out

"""An exported bundle is the published one, and lies in its folder whole or not at all."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deploy import export
from deploy.app import main
from deploy.bundle import read_bundle
from pipeline.config import Recipe
from pipeline.evaluate import EvaluateFacts
from pipeline.lock import exclusive
from pipeline.recipe import RECIPE_FILE, write_recipe
from pipeline.train import CHECKPOINT
from tests.deploy.published import settings
from tests.deploy.refusal import refused
from tests.pipeline.small_log import file_bytes
from tests.pipeline.small_models import write_manifest
from tests.pipeline.stage_facts import decided, trained

DATE = "2024-01-02"


@pytest.fixture
def out(published: Path, tmp_path: Path) -> Path:
    """An output directory with a trained day that no gate has looked at."""
    train = tmp_path / "out" / DATE / "train"
    shutil.copytree(published / "checkpoints", train / CHECKPOINT)
    write_recipe(settings(), train)
    write_manifest(train, "t", trained([DATE]))
    return tmp_path / "out"


def artifacts(out: Path) -> dict[str, bytes]:
    """All files of an output directory but those of its lock."""
    return {name: data for name, data in file_bytes(out).items() if not name.startswith(".")}


def write_decision(out: Path, train_id: str, *, passed: bool) -> None:
    """The gate's, on the evaluation of a training."""
    evaluated = EvaluateFacts(auc={})
    write_manifest(out / DATE / "evaluate", "e", evaluated, train=train_id)
    reasons = () if passed else ("click: auc 0.4000 is below gate.min_auc=0.5",)
    write_manifest(out / DATE / "gate", "g", decided(*reasons), evaluate="e")


def with_tables(precision: str) -> Recipe:
    recipe = settings()
    publish = recipe.publish.model_copy(update={"tables": precision})
    return recipe.model_copy(update={"publish": publish})


def command(out: Path, folder: Path, date: str = DATE) -> list[str]:
    return ["export", "--out", str(out), "--date", date, "--to", str(folder)]


@pytest.mark.parametrize("is_there", [True, False])
def test_the_folder_holds_the_bundle_that_would_be_published(
    published: Path, out: Path, tmp_path: Path, is_there: bool
) -> None:
    folder = tmp_path / "handed" / "over"
    if is_there:
        folder.mkdir(parents=True)
    before = artifacts(out)

    assert main(command(out, folder)) == 0

    assert file_bytes(folder) == file_bytes(published / "bundle")
    assert read_bundle(folder).recipe == settings()
    towers = [load_file(path) for path in folder.glob("encoder/*/model.safetensors")]
    assert len(towers) == 2
    assert not [name for tower in towers for name in tower if "lora" in name]
    assert [path.name for path in folder.parent.iterdir()] == ["over"]
    assert artifacts(out) == before, "neither published nor promoted"


@pytest.mark.parametrize(
    ("trained", "run", "options", "expected"),
    [
        ("fp32", None, ["--tables", "int8"], "int8"),
        ("int8", None, ["--tables", "fp32"], "fp32"),
        ("int8", None, [], "int8"),
        ("fp32", "int8", [], "int8"),  # the run publishes anew, and trains nothing
    ],
)
def test_tables_are_held_as_asked_or_as_the_run_publishes_them(  # noqa: PLR0913 # a table of cases
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: str,
    run: str | None,
    options: list[str],
    expected: str,
) -> None:
    write_recipe(with_tables(trained), out / DATE / "train")
    if run is not None:
        write_recipe(with_tables(run), out / DATE)

    assert main([*command(out, tmp_path / "bundle"), *options]) == 0

    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.table_precision == expected
    assert bundle.recipe == with_tables(expected)
    assert f"60 table rows in {expected}, " in capsys.readouterr().out.replace("\n", "")


def test_an_unknown_precision_of_tables_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(out, tmp_path / "bundle"), "--tables", "int4"]) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in ("--tables", "int4", "fp32", "int8")), printed
    assert not (tmp_path / "bundle").exists()


def test_a_refused_model_is_exported_and_the_reason_said(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_decision(out, "t", passed=False)

    assert main(command(out, tmp_path / "bundle")) == 0

    printed = capsys.readouterr().out
    assert "the gate refused this model: click: auc 0.4000 is below" in printed
    assert "no gate has looked" not in printed
    assert read_bundle(tmp_path / "bundle").tables


@pytest.mark.parametrize("passed", [True, False])
def test_a_decision_on_another_model_of_the_date_is_not_told(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], passed: bool
) -> None:
    write_decision(out, "what was there before `braid stage train`", passed=passed)

    assert main(command(out, tmp_path / "bundle")) == 0

    printed = capsys.readouterr().out
    assert "refused" not in printed
    assert "no gate has looked at this model" in printed


def test_a_model_that_passed_is_exported_without_a_word(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_decision(out, "t", passed=True)

    assert main(command(out, tmp_path / "bundle")) == 0

    assert "gate" not in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "full", tmp_path / "file"
    folder.mkdir()
    (folder / "theirs").write_text("kept")
    file.write_text("kept")

    assert f"--to {folder} is not empty" in refused(capsys, main(command(out, folder)))
    assert f"--to {file} is a file" in refused(capsys, main(command(out, file)))
    assert f"--to {file / 'in'} cannot be written" in refused(
        capsys, main(command(out, file / "in"))
    )
    assert file_bytes(folder) == {"theirs": b"kept"}
    assert file.read_text() == "kept"


def test_a_failed_export_leaves_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(recipe: object, train: Path, scratch: Path) -> None:
        (scratch / "bundle").mkdir()
        raise OSError("the disk is gone")

    folder = tmp_path / "to" / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(export, "publish", half)
        assert main(command(out, folder)) == 1
    assert list(folder.parent.iterdir()) == []
    # What a killed one left is no hindrance.
    (folder.parent / ".bundle.partial").mkdir()
    assert main(command(out, folder)) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


def test_a_day_without_a_trained_model_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = refused(capsys, main(command(out, tmp_path / "bundle", "2024-01-03")))
    assert "no trained model of that date (trained are: 2024-01-02); run `braid run" in other
    nowhere = tmp_path / "nowhere"
    assert "trained are: none" in refused(capsys, main(command(nowhere, tmp_path / "bundle")))
    assert not nowhere.exists()
    assert not (tmp_path / "bundle").exists()


def test_a_training_without_its_recipe_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / DATE / "train" / RECIPE_FILE).unlink()
    error = refused(capsys, main(command(out, tmp_path / "bundle")))
    assert f"{RECIPE_FILE} cannot be read" in error


def test_a_run_that_goes_on_is_not_in_the_way(published: Path, out: Path, tmp_path: Path) -> None:
    with exclusive(out, "braid run"):
        assert main(command(out, tmp_path / "bundle")) == 0
    assert file_bytes(tmp_path / "bundle") == file_bytes(published / "bundle")


def test_a_training_that_is_replaced_meanwhile_is_not_exported(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*_: object) -> None:
        write_manifest(out / DATE / "train", "u", trained([DATE]))
        raise FileNotFoundError("a file of the training before")

    monkeypatch.setattr(export, "publish", replaced)
    error = refused(capsys, main(command(out, tmp_path / "bundle")))
    assert "train was written anew at this moment; run the same command again" in error
    assert not (tmp_path / "bundle").exists()

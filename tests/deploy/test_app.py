import importlib.metadata
from pathlib import Path

import pytest

from deploy.app import main
from pipeline.cli import STAGE_HELP
from pipeline.stages import STAGES


def test_help_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "backfill" in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"braid {importlib.metadata.version('braid')}\n"


def test_help_names_every_stage() -> None:
    assert STAGE_HELP.rstrip(".").replace(" or", ",").split(", ") == list(STAGES)


def test_usage_error_ends_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--no-such-option"]) == 2


def test_user_error_is_one_sentence_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    code = main(["run", "--recipe", "no-such-recipe", "--date", "2024-01-01", "--out", str(out)])

    assert code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: there is no recipe 'no-such-recipe'")
    assert "Traceback" not in printed
    assert not out.exists()

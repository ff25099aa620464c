from pathlib import Path

import pytest

from deploy.app import main


def test_help_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "backfill" in capsys.readouterr().out


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

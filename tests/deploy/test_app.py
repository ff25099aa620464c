import importlib.metadata
from pathlib import Path

import pytest

from deploy.app import main
from pipeline import recipe
from pipeline.run_cli import STAGE_HELP
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


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        (["stage", "join", "--recipe", "demo", "--date", "2024-01-01", "--out", "out"], True),
        (["validate", "--recipe", "demo"], False),
    ],
)
def test_only_a_command_with_stages_is_said_to_go_on(
    command: list[str],
    goes_on: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("words of a library\nthe cause")

    monkeypatch.setattr(recipe, "load_recipe", broken)

    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "failed: RuntimeError: the cause\n" in printed
    assert ("finished stages are kept" in printed) is goes_on


def test_validate_names_what_follows_from_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """Three levels of 32 codes and an OOV row each; items of the codebook and an OOV row."""
    codes = "{vectors: {kind: column}, rq: {codebook_size: 32}, vq: {max_items: 500}}"
    assert main(["validate", "--recipe", "demo", "--set", f"codes={codes}"]) == 0

    _, tables, features = capsys.readouterr().out.splitlines()
    sizes = ["sid_0 33 x 16", "sid_1 33 x 16", "sid_2 33 x 16", "vq 501 x 16"]
    assert tables.strip() == f"tables of codes: {', '.join(sizes)}"
    assert features.strip().startswith("features of codes: sid_0, sid_1, sid_2, vq, ")
    assert main(["validate", "--recipe", "demo"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_validate_names_sequences_that_nothing_reads(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", "--recipe", "demo", "--set"]
    assert main([*command, "ranking.model.interests=[]"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert "read by nothing" in line
    assert line.endswith(": clicks_item, clicks_category, clicks_gap")
    content = "content={text: {max_tokens: 16}}"
    assert main([*command, "ranking.model.interests=[]", "--set", content]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1, "content reads the items"


def test_completion_and_short_options_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["data", "import", "movielens"], ["data", "synth"], ["score"]):
        assert main([*command, "--help"]) == 0
        assert "-o" in capsys.readouterr().out.split()
    assert main(["--help"]) == 0
    assert "--install-completion" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    assert "path.to.list+=value" in capsys.readouterr().out

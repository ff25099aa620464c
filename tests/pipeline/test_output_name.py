from pathlib import Path

import pytest

from deploy.app import main
from embedding.errors import UserError
from pipeline.output_name import NAME_FILE, claim


def test_a_directory_belongs_to_the_recipe_of_its_first_run(tmp_path: Path) -> None:
    claim(tmp_path, "ours")
    claim(tmp_path, "ours")

    with pytest.raises(UserError, match=r"runs of the recipe 'ours'.*'shadow'.*--set name=ours"):
        claim(tmp_path, "shadow")


def test_a_damaged_owner_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / NAME_FILE).write_text("{")

    with pytest.raises(UserError, match=r"recipe_name.json is damaged.*remove it"):
        claim(tmp_path, "ours")


def test_another_recipe_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir()
    claim(out, "ours")
    words = ["--recipe", "demo", "--date", "2024-01-03", "--out", str(out)]

    assert main(["run", *words, "--set", f"data.root={data}"]) == 2
    assert "holds runs of the recipe 'ours'" in capsys.readouterr().err
    assert not data.exists()

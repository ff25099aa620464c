"""Guides and help texts name only commands and files that exist."""

import re
from pathlib import Path

import pytest
import typer

from deploy.app import app
from pipeline.recipe import load_recipe
from pipeline.reports.recipe_page import recipe_page

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for package in ("embedding", "multimodal", "ranking", "pipeline", "deploy", "benchmarks")
    for kind in ("*.py", "*.yaml", "*.j2")
    for path in sorted((ROOT / package).rglob(kind))
]
OTHERS = [ROOT / name for name in ("pyproject.toml", "Makefile", "ray_cluster.yaml")]
OTHERS += [ROOT / "deploy" / "Dockerfile", *sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))]
LINE = re.compile(r"`braid ([^`]+)`|^ *(?:# *)?(?:[\w./]*bin/)?braid (.+)$", re.MULTILINE)
OPTION = re.compile(r"(?<![^\s`])--?[a-z][a-z-]*")
COMMAND = re.compile(r"(?:`|^ *(?:# *)?|bin/)braid ([a-z]+)(?: ([a-z]+))?", re.MULTILINE)
FILE = re.compile(
    r"(?:embedding|multimodal|ranking|pipeline|deploy|benchmarks|docs|requirements|tests)"
    r"/[\w/.-]*\.(?:py|md|yaml|txt)\b"
)
TO_BE_WRITTEN = {"ranking/classifiers/gated.py"}
"""Files that the guide tells the reader to write."""


def commands() -> dict[str, set[str]]:
    """Names of commands and of those below them."""
    root = typer.main.get_command(app)
    return {name: set(getattr(command, "commands", ())) for name, command in root.commands.items()}


@pytest.mark.parametrize("path", [*GUIDES, *OTHERS], ids=lambda path: path.name)
def test_guides_name_commands_and_files_that_exist(path: Path) -> None:
    text = path.read_text()
    assert unknown_commands(text) == []
    named = set(FILE.findall(text)) - TO_BE_WRITTEN
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_sources_name_commands_that_exist() -> None:
    found = {path.name: unknown_commands(path.read_text()) for path in SOURCES}
    assert {name: unknown for name, unknown in found.items() if unknown} == {}


def unknown_commands(text: str) -> list[str]:
    known = commands()
    return [
        f"braid {name} {below}".rstrip()
        for name, below in COMMAND.findall(text)
        if name not in known or (known[name] and below and below not in known[name])
    ]


@pytest.mark.parametrize("path", [*GUIDES, *OTHERS], ids=lambda path: path.name)
def test_commands_in_guides_have_the_options_they_need_and_no_others(path: Path) -> None:
    # Docstrings make the reference of the recipe, and they name single options.
    assert wrong_options(path.read_text(), whole=path.name != "recipe.md") == []


def test_sources_name_options_that_exist() -> None:
    """A sentence may name one option of a command, so Python files need not name all."""
    found = {p.name: wrong_options(p.read_text(), whole=p.suffix == ".yaml") for p in SOURCES}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def wrong_options(text: str, *, whole: bool = True) -> list[str]:
    """Options that commands do not have and, where they are `whole`, those that they lack.

    A command that is only named has no options, and one with an ellipsis is not whole.
    """
    joined = re.sub(r"\\\n *(?:# *)?", " ", text)
    found = []
    for inline, line in LINE.findall(joined):
        words = (inline or line).split(" # ")[0].split("  #")[0]
        given = set(OPTION.findall(words))
        command, name = typer.main.get_command(app), "braid"
        for word in words.split():
            if word not in getattr(command, "commands", ()):
                break
            command, name = command.commands[word], f"{name} {word}"
        options = [p for p in command.params if p.param_type_name == "option"]
        known = {"--help", *(opt for p in options for opt in (*p.opts, *p.secondary_opts))}
        found += [f"{name} has no {option}" for option in sorted(given - known)]
        if whole and given and "..." not in words:
            needed = [p for p in options if p.required]
            found += [f"{name} lacks {p.opts[0]}" for p in needed if not given & set(p.opts)]
    return found


def test_the_reference_of_the_recipe_is_that_of_its_models() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()

    assert page == recipe_page(), "run: braid schema --markdown > docs/recipe.md"


def test_every_section_of_the_recipe_is_in_the_reference_and_every_link_leads_to_one() -> None:
    """Sections by path, as a recipe that is written out has them."""
    page = recipe_page()
    paths = re.findall(r"^##+ `(.*)`$", page, re.MULTILINE)
    wanted = [k for k, v in load_recipe("demo").model_dump().items() if isinstance(v, dict)]
    assert set(wanted) <= set(paths)
    assert {"features.tables.ids", "ranking.model.classifier", "codes.vectors.swing"} < set(paths)
    links = set(re.findall(r"\]\(#(.*?)\)", page))
    assert links == {path.replace(".", "") for path in paths}
    for key in ("ranks_per_host", "init_bound", "popular_share", "max_failures", "user_buckets"):
        assert len(re.findall(rf"^\| `{key}` \| .+ \| .+ \| .+ \|$", page, re.MULTILINE)) == 1, key


def test_sources_name_no_file_outside_of_the_repository() -> None:
    assert [path.name for path in SOURCES if "../" in path.read_text()] == []


def test_an_invented_command_would_be_found() -> None:
    assert unknown_commands("`braid fly` and `braid bench fly`\nbraid run --recipe demo") == [
        "braid fly",
        "braid bench fly",
    ]


def test_wrong_options_would_be_found() -> None:
    assert wrong_options("`braid models promote --date D`, `braid models promote`") == [
        "braid models promote lacks --out"
    ]
    assert wrong_options("braid run -r demo -d D \\\n  --out O  # --set x\nbraid doctor --all") == [
        "braid doctor has no --all"
    ]

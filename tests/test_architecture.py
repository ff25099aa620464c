"""The tree's own rules, checked on the source."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("embedding", "multimodal", "ranking", "pipeline", "deploy")
MAY_IMPORT = {
    "embedding": set(),
    "multimodal": {"embedding"},
    "ranking": {"embedding"},
    "pipeline": {"embedding", "multimodal", "ranking"},
    "deploy": {"embedding", "multimodal", "ranking", "pipeline"},
}
TOP_LEVEL = {
    *PACKAGES,
    "pyproject.toml",
    "README.md",
    "Makefile",
    "ray_cluster.yaml",
    "tests",
    "benchmarks",
    "docs",
    "requirements",
    ".ci",
    "LICENSE",
}
MAX_LINES = 400


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in source_files()}
    assert set(project["tool"]["setuptools"]["packages"]) == found


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        ours = imported_packages(path) & set(PACKAGES) - {package}
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours}"


def test_every_schema_version_is_checked_when_it_is_read() -> None:
    for path in source_files():
        for line in path.read_text().splitlines():
            if line.strip().startswith("schema_version:"):
                assert line.strip().startswith("schema_version: Literal["), (path, line)


def test_fbgemm_is_imported_only_where_the_kernels_are_owned() -> None:
    for path in source_files():
        if path.relative_to(ROOT).parts[0] not in ("embedding", "deploy"):
            assert "fbgemm_gpu" not in imported_packages(path), path


def test_source_files_stay_small() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in source_files()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_source_is_ascii() -> None:
    assert not [path for path in source_files() if not path.read_text().isascii()]


def test_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top - TOP_LEVEL if not name.startswith(".")} == set()


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("pipeline.config, pipeline.recipe, pipeline.cli", "torch ray pyarrow pandas torchrec"),
        # Of what workers import, a command has no use for the kernels.
        ("pipeline.command, deploy.publish, pipeline.tasks", "torchrec fbgemm_gpu transformers"),
        ("pipeline.samples.ingest, pipeline.samples.join, pipeline.tasks", "torch"),
        ("pipeline.planning_worker", "torch pandas"),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(modules: str, heavy: str) -> None:
    code = (
        f"import sys; import {modules}; heavy = set({heavy.split()}) & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

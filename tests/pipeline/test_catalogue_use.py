"""Stages keep the catalogue they were made with, and publish nothing of two states of it."""

import os
from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.artifacts import StageFacts, read_manifest
from pipeline.catalogue_use import CATALOGUE, CODES, CatalogueUse
from pipeline.console import Reporter
from pipeline.stages import StageOutput, StageSpec, execute
from tests.pipeline.small_log import write_catalogue


class Made:
    """A stage that reads the catalogue, and how often it did."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "data"
        self.directory = folder / "out" / "2024-01-01" / "join"
        self.config = {"columns": ["a"]}
        self.ingest, self.codebooks, self.codes = "i", "v0001", "of 4 items"
        self.times = 0
        write_catalogue(self.root)

    def read(self, scratch: Path) -> StageOutput:
        self.times += 1
        (scratch / "samples").write_text(f"{self.times}")
        return StageOutput(0, 0, StageFacts())

    def execute(self, *, refresh: bool = False) -> str:
        use = CatalogueUse(self.root, refresh)
        inputs = {"ingest": self.ingest, CATALOGUE: use.fingerprint()}
        inputs |= {CODES: self.codes, "codebooks": self.codebooks}
        spec = StageSpec("join", self.directory, self.config, inputs, self.read)
        (found,) = use.specs([spec])
        return execute(found, Reporter()).status


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path)
    made.directory.parent.mkdir(parents=True)
    assert made.execute() == "ran"
    return made


def test_a_touched_or_rewritten_catalogue_leaves_what_is_published(made: Made) -> None:
    os.utime(made.root / "items.parquet", ns=(1, 1))
    assert made.execute() == "current"
    write_catalogue(made.root, num_items=9)
    assert made.execute() == "current"
    assert made.times == 1


def test_the_flag_takes_the_new_catalogue_once(made: Made) -> None:
    assert made.execute(refresh=True) == "current", "it is the same one"
    write_catalogue(made.root, num_items=9)
    assert made.execute(refresh=True) == "ran"
    assert [made.execute(refresh=True), made.execute()] == ["current", "current"]


def test_codes_of_more_items_leave_what_is_published(made: Made) -> None:
    write_catalogue(made.root, num_items=9)
    made.codes = "of 9 items"
    assert made.execute() == "current"
    assert made.execute(refresh=True) == "ran"
    assert made.execute() == "current"


@pytest.mark.parametrize("change", ["ingest", "config", "codebooks", "damage"])
def test_what_is_made_again_for_another_reason_takes_the_new_catalogue(
    made: Made, change: str
) -> None:
    write_catalogue(made.root, num_items=9)
    if change == "ingest":
        made.ingest = "j"
    elif change == "codebooks":
        made.codebooks = "v0002"
    elif change == "config":
        made.config = {"columns": ["a", "b"]}
    else:
        (made.directory / "samples").unlink()

    assert made.execute() == "ran"
    manifest = read_manifest(made.directory)
    assert manifest is not None
    assert manifest.inputs[CATALOGUE] == CatalogueUse(made.root).fingerprint()


def test_a_catalogue_that_changes_meanwhile_is_not_published(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.directory.parent.mkdir(parents=True)
    read = made.read

    def slowly(scratch: Path) -> StageOutput:
        output = read(scratch)
        write_catalogue(made.root, num_items=4 + made.times)
        return output

    made.read = slowly  # type: ignore[method-assign] # of this one
    with pytest.raises(UserError, match=r"items.parquet or users.parquet in .* changed while join"):
        made.execute()
    assert read_manifest(made.directory) is None
    made.read = read  # type: ignore[method-assign] # of this one
    assert made.execute() == "ran"


def test_stages_that_do_not_read_it_are_left_alone(tmp_path: Path) -> None:
    made = Made(tmp_path)
    spec = StageSpec("plan", made.directory, {}, {"features": "f"}, made.read)

    assert list(CatalogueUse(made.root).specs([spec])) == [spec]

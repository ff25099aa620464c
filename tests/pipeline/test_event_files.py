"""When the event files of a day are the same, and when they are read to tell."""

import os
import shutil
from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline import event_files
from pipeline.event_files import DayFiles

DAY = "2024-01-01"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "events" / f"dt={DAY}"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"part-{number}.parquet").write_bytes(bytes([number]) * 100)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    found: list[str] = []
    read = event_files.file_sha256

    def counted(path: Path) -> str:
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(event_files, "file_sha256", counted)
    return found


def test_a_copy_with_other_times_is_the_same(folder: Path, reads: list[str]) -> None:
    root = folder.parents[1]
    found = DayFiles.of(root, DAY)
    assert sorted(reads) == ["part-0.parquet", "part-1.parquet"]
    assert found.are_those_of(root, DAY)
    assert len(reads) == 2, "times, sizes and names are those of before"
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))

    assert found.are_those_of(root, DAY)
    assert len(reads) == 4
    assert DayFiles.of(root, DAY).content == found.content
    assert len(reads) == 4, "once in a process"
    assert found.num_bytes == 200


@pytest.mark.parametrize("what", ["one byte", "a name", "one more", "one less"])
def test_what_is_another_file_is_told(folder: Path, what: str) -> None:
    root = folder.parents[1]
    found, file = DayFiles.of(root, DAY), folder / "part-0.parquet"
    if what == "one byte":  # as a label that is corrected: as large as before, the footer, too
        file.write_bytes(b"\1" + bytes(99))
        os.utime(file, ns=(1, 1))
    elif what == "a name":
        file.rename(folder / "part-9.parquet")
    elif what == "one more":
        shutil.copyfile(file, folder / "part-9.parquet")
    else:
        file.unlink()

    assert not found.are_those_of(root, DAY)
    assert DayFiles.of(root, DAY).content != found.content


def test_a_day_of_another_size_is_told_without_reading(folder: Path, reads: list[str]) -> None:
    root = folder.parents[1]
    found = DayFiles.of(root, DAY)
    reads.clear()
    (folder / "part-9.parquet").write_bytes(b"late")

    assert not found.are_those_of(root, DAY)
    assert not reads


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "part-2.parquet").mkdir()
    with pytest.raises(UserError, match=r"part-2.parquet cannot be read \(Is a directory\); make"):
        DayFiles.of(folder.parents[1], DAY)

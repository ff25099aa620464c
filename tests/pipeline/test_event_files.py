"""When the event files of a day are the same, and when they are read to tell."""

import os
import shutil
from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline import event_files
from pipeline.event_files import DayFiles, KnownDays

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


def known(folder: Path) -> KnownDays:
    """As a new process knows them."""
    return KnownDays(folder.parents[2], folder.parents[1], lambda _: None)


def test_a_copy_with_other_times_is_the_same_and_read_once(folder: Path, reads: list[str]) -> None:
    found = known(folder).files(DAY)
    assert sorted(reads) == ["part-0.parquet", "part-1.parquet"]
    assert known(folder).are(DAY, found)
    assert len(reads) == 2, "times, sizes and names are those of before"
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))

    assert known(folder).are(DAY, found)
    assert len(reads) == 4
    assert known(folder).are(DAY, found)
    assert known(folder).files(DAY).content == found.content
    assert len(reads) == 4, "it is kept that these are the same"
    assert found == DayFiles.of(folder.parents[1], DAY).model_copy(update={"seen": found.seen})
    assert found.num_bytes == 200


def test_much_that_is_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "_SAID_BYTES", 200)
    said: list[str] = []
    KnownDays(folder.parents[2], folder.parents[1], said.append).files(DAY)
    (line,) = said
    assert f"events of {DAY}" in line


@pytest.mark.parametrize("damage", ["{", '{"2024-01-01": 3}', None])
def test_what_was_kept_may_be_damaged_or_not_writable(
    folder: Path, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage is None:

        def full(*_: object) -> None:
            raise OSError(28, "no space left")

        monkeypatch.setattr(event_files, "write_durably", full)
    else:
        (folder.parents[2] / event_files.KNOWN_DAYS).write_text(damage)
    assert known(folder).files(DAY) == DayFiles.of(folder.parents[1], DAY)


@pytest.mark.parametrize("what", ["one byte", "a name", "one more", "one less"])
def test_what_is_another_file_is_told(folder: Path, what: str) -> None:
    found, file = known(folder).files(DAY), folder / "part-0.parquet"
    if what == "one byte":  # as a label that is corrected: as large as before, the footer, too
        file.write_bytes(b"\1" + bytes(99))
        os.utime(file, ns=(1, 1))
    elif what == "a name":
        file.rename(folder / "part-9.parquet")
    elif what == "one more":
        shutil.copyfile(file, folder / "part-9.parquet")
    else:
        file.unlink()

    assert not known(folder).are(DAY, found)
    assert known(folder).files(DAY).content != found.content


def test_a_day_of_another_size_is_told_without_reading(folder: Path, reads: list[str]) -> None:
    found = known(folder).files(DAY)
    reads.clear()
    (folder / "part-9.parquet").write_bytes(b"late")

    assert not known(folder).are(DAY, found)
    assert not reads


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "part-2.parquet").mkdir()
    with pytest.raises(UserError, match=r"part-2.parquet cannot be read \(Is a directory\); make"):
        DayFiles.of(folder.parents[1], DAY)

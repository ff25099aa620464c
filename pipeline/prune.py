"""`braid prune`: deletes what an output directory holds and `pipeline.kept` does not keep."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from pipeline.artifacts import MANIFEST, finish_interrupted
from pipeline.console import size
from pipeline.kept import RECORDS, SPANS, Kept, run_dates
from pipeline.lock import changing
from pipeline.pruned import note_pruned
from pipeline.registry import MODELS, PRODUCTION, require_output
from pipeline.stages import STAGES

ASIDE = ".pruned-"
"""Of the name of a directory with what is being deleted."""
LEFT = "left by a prune that was interrupted"


@dataclass(frozen=True)
class Prunable:
    """Files and directories that can be deleted together."""

    what: str
    paths: tuple[Path, ...]
    reason: str

    @property
    def num_bytes(self) -> int:
        """Of the files, those that lie elsewhere under another name included."""
        return sum(path.stat().st_size for path in _files(self.paths))


def prunable(out: Path, keep: int) -> list[Prunable]:
    """What can be deleted, where the latest `keep` runs and promotions are kept.

    Raises:
        UserError: `out` is no directory, or the recipe of its latest run cannot be read.
    """
    require_output(out)
    dates = run_dates(out)
    if not dates:
        return []
    return _not_kept(out, Kept(out, dates, keep))


def _not_kept(out: Path, kept: Kept) -> list[Prunable]:
    found = [_prunable(path, LEFT) for path in sorted(out.glob(f"{ASIDE}*"))]
    for directory in sorted(out.glob("????-??-??")):
        found += _of_date(directory, kept)
    for directory in sorted((out / MODELS).glob("*")):
        if directory.name not in kept.models:
            found.append(_prunable(directory, "no rollback returns to it"))
    return found


def tried(out: Path, keep: int) -> tuple[str, ...]:
    """Dates of bundles that stay because they were published, never promoted, and may be yet."""
    dates = run_dates(out)
    return Kept(out, dates, keep).tried if dates else ()


def freed_bytes(found: Iterable[Prunable]) -> int:
    """What deleting all of it frees: files that keep another name free nothing."""
    seen: dict[tuple[int, int], tuple[int, int, int]] = {}
    for path in (path for entry in found for path in _files(entry.paths)):
        stat = path.lstat()
        names, *_ = seen.get((stat.st_dev, stat.st_ino), (0, 0, 0))
        seen[stat.st_dev, stat.st_ino] = (names + 1, stat.st_nlink, stat.st_size)
    return sum(size for names, links, size in seen.values() if names == links)


def set_aside(out: Path, keep: int) -> list[Prunable]:
    """Move what can be deleted into a hidden directory, while nothing changes production.

    That takes a moment: sizes are looked up and files deleted (`remove`) afterwards. What a process
    that is killed on the way leaves there, the next one deletes. Stages that a crash interrupted as
    they were published are published first, so the caller must hold the directory. All runs but the
    latest say that they were pruned (`pipeline.pruned`).

    Raises:
        UserError: as `prunable`, or another process holds what is in production all the time.
    """
    require_output(out)
    for directory in out.glob("????-??-??"):
        for stage in STAGES:
            finish_interrupted(directory / stage)
    with changing(out / PRODUCTION):
        dates = run_dates(out)
        if not dates:
            return []
        kept = Kept(out, dates, keep)
        found = _not_kept(out, kept)
        for date in set(dates) - kept.latest:
            note_pruned(out / date)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=out))
        moved = [_moved(entry, aside / str(number)) for number, entry in enumerate(found)]
    if not moved:
        aside.rmdir()
    return moved


def remove(found: Iterable[Prunable]) -> None:
    """Delete what was set aside."""
    for directory in {path.parents[1] for entry in found for path in entry.paths}:
        shutil.rmtree(directory)


def prune_table(found: list[Prunable]) -> Table:
    """One row each, the largest first."""
    table = Table("size", "what", "why nobody needs it", box=SIMPLE)
    for entry in sorted(found, key=lambda entry: -entry.num_bytes):
        table.add_row(size(entry.num_bytes), escape(entry.what), entry.reason)
    return table


def _of_date(directory: Path, kept: Kept) -> Iterator[Prunable]:
    date = directory.name
    entries = sorted(directory.iterdir())
    spans = [path for path in entries if path.name in SPANS]
    rest = [path for path in entries if path.name not in (*SPANS, *RECORDS)]
    has_records = len(entries) > len(spans) + len(rest)
    if date in kept.dates:
        yield from _leftovers(rest, is_latest=date in kept.latest)
        if not kept.needs_samples(date):
            for path in spans:
                yield _prunable(path, "no run trains on its days")
        return
    if date in kept.no_longer_tried:
        reason = "published, never promoted, and not among the latest that may be"
        yield _prunable(directory / "publish", reason)
        rest.remove(directory / "publish")
    if kept.needs_samples(date):
        if rest:
            what = f"{directory}, but {' and '.join(SPANS)}, and its figures"
            yield Prunable(what, tuple(rest), "no run starts from it, and it is no recent one")
    elif not has_records:
        yield _prunable(directory, "no run needs it")
    elif spans or rest:
        what = f"{directory}, but its figures"
        yield Prunable(what, (*spans, *rest), "no run needs it")


def _leftovers(paths: Iterable[Path], *, is_latest: bool) -> Iterator[Prunable]:
    for path in paths:
        if path.name.endswith(".abandoned"):
            yield _prunable(path, "unfinished, of settings or inputs that changed since")
        elif path.name.endswith(".outdated") and _published_in_place_of(path).exists():
            yield _prunable(path, "replaced by a later one")
        elif path.name.endswith(".partial") and not is_latest and not (path / MANIFEST).exists():
            yield _prunable(path, "unfinished, and no run of late")


def _published_in_place_of(path: Path) -> Path:
    return path.with_name(path.stem.removeprefix("."))


def _moved(entry: Prunable, folder: Path) -> Prunable:
    folder.mkdir()
    return replace(entry, paths=tuple(path.rename(folder / path.name) for path in entry.paths))


def _prunable(path: Path, reason: str) -> Prunable:
    return Prunable(str(path), (path,), reason)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        inside = path.rglob("*") if path.is_dir() else (path,)
        yield from (file for file in inside if file.is_file() and not file.is_symlink())

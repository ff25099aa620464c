"""`braid prune`: deletes what an output directory holds and `pipeline.kept` does not keep.

It is what makes room on a full disk, so nothing that it needs to write must keep it from deleting.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

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
"""Of the names of what is being deleted."""
LEFT = "left by a prune that was interrupted"
logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class SetAside:
    """What nobody sees any more, to be deleted."""

    found: list[Prunable]
    runs: list[Path]
    """That are not whole without it."""

    def delete(self) -> None:
        """Delete it."""
        for path in (path for entry in self.found for path in entry.paths):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for run in self.runs:  # now there is room for what may have found none
            try:
                note_pruned(run)
            except OSError as fault:
                logger.warning("%s is not noted as pruned: %s", run, fault)


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


def set_aside(out: Path, keep: int) -> SetAside:
    """Rename what can be deleted, while nothing changes production; what follows is `delete`.

    That takes a moment: sizes are looked up and files deleted afterwards. No file or directory is
    made for it, as a full disk has no room for one. What a process that is killed on the way leaves
    there, the next one deletes. Stages that a crash interrupted as they were published are
    published first, so the caller must hold the directory. All runs but the latest say that they
    were pruned (`pipeline.pruned`).

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
            return SetAside([], [])
        kept = Kept(out, dates, keep)
        found = _not_kept(out, kept)
        runs = [out / date for date in sorted(set(dates) - kept.latest)]
        for run in runs:  # before, so that a process that is killed on the way has said so
            with suppress(OSError):
                note_pruned(run)
        return SetAside([_renamed(entry, out) for entry in found], runs)


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


def _renamed(entry: Prunable, out: Path) -> Prunable:
    new = (path.rename(out / f"{ASIDE}{uuid4().hex}") for path in entry.paths)
    return replace(entry, paths=tuple(new))


def _prunable(path: Path, reason: str) -> Prunable:
    return Prunable(str(path), (path,), reason)


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        inside = path.rglob("*") if path.is_dir() else (path,)
        yield from (file for file in inside if file.is_file() and not file.is_symlink())

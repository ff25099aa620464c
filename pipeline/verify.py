"""Reading everything an output directory holds, and comparing it with its checksums."""

from collections.abc import Callable
from pathlib import Path

from embedding.errors import UserError
from multimodal.codes.versions import damaged_versions
from multimodal.token_store import damaged_parts
from pipeline.artifacts import MANIFEST, damaged_files, read_manifest
from pipeline.codes.paths import codebook_versions
from pipeline.content.stage import STORES
from pipeline.days import available_days
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import MODELS
from pipeline.samples.ingest_facts import IngestFacts
from pipeline.spans import INGEST


def verify(out: Path, progress: Callable[[int, int], None]) -> list[str]:
    """What is missing or damaged, a sentence each; empty if all is as it was written.

    Stages compare a file when they have a reason to; this reads artifacts, promoted bundles,
    codebooks and token stores whole. Runs may go on meanwhile: what one of them replaces while it
    is read is read again.

    Args:
        out: output directory.
        progress: called with directories read and in all.
    """
    artifacts = [
        *sorted(out.glob(f"????-??-??/*/{MANIFEST}")),
        *sorted(out.glob(f"{MODELS}/*/{MANIFEST}")),
    ]
    stores = [path for path in sorted((out / STORES).glob("*")) if path.is_dir()]
    codebooks = [path for path in (codebook_versions(out),) if path.is_dir()]
    total = len(artifacts) + len(codebooks) + len(stores)
    logged = _days_in_log(out)
    found = []
    for done, path in enumerate(artifacts, start=1):
        found += _faults(path.parent, logged)
        progress(done, total)
    for done, root in enumerate(codebooks, start=len(artifacts) + 1):
        found += damaged_versions(root) and damaged_versions(root)  # written at this moment?
        progress(done, total)
    for done, store in enumerate(stores, start=len(artifacts) + len(codebooks) + 1):
        found += [str(fault) for fault in damaged_parts(store) and damaged_parts(store)]
        progress(done, total)
    return found


def _faults(directory: Path, logged: frozenset[str]) -> list[str]:
    try:
        before = read_manifest(directory)
        damaged = damaged_files(directory, thorough=True)
        is_replaced = bool(damaged) and read_manifest(directory) != before
        remedy = _remedy(directory, logged) if damaged and not is_replaced else ""
    except UserError as error:  # of the manifest
        return [str(error)]
    except FileNotFoundError:  # it was there when it was looked for
        is_replaced = True
    if is_replaced:
        return _faults(directory, logged)
    return [
        f"{directory / name} is missing or damaged (its SHA-256 is not the recorded one); {remedy}"
        for name in damaged
    ]


def _remedy(directory: Path, logged: frozenset[str]) -> str:
    if directory.parent.name == MODELS:
        return f"restore {directory}, or promote another date; do not delete it"
    days = {directory.parent.name}
    if directory.name == INGEST:
        manifest = read_manifest(directory, IngestFacts)
        assert manifest is not None
        days |= set(manifest.facts.days)
    gone = sorted(days - logged)
    if gone:
        return (
            f"restore {directory} from a copy, and do not delete it: the event log no longer has "
            f"{gone[0]}, so no run writes it again"
        )
    return f"delete {directory}, and the next run writes it again"


def _days_in_log(out: Path) -> frozenset[str]:
    """Days that the event logs of the runs in an output directory have today."""
    days: set[str] = set()
    for path in out.glob(f"????-??-??/{RECIPE_FILE}"):
        try:
            days.update(available_days(read_recipe(path.parent).data.root))
        except UserError:  # a recipe of another version, or a log that is not there
            continue
    return frozenset(days)

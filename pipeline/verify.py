"""Reading everything an output directory holds, and comparing it with its checksums."""

from collections.abc import Callable
from pathlib import Path

from multimodal.token_store import damaged_parts
from pipeline.artifacts import MANIFEST, damaged_files
from pipeline.content import STORES
from pipeline.registry import MODELS


def verify(out: Path, progress: Callable[[int, int], None]) -> list[str]:
    """What is missing or damaged, a sentence each; empty if all is as it was written.

    Stages compare a file when they have a reason to; this reads artifacts, promoted bundles and
    token stores whole.

    Args:
        out: an output directory that no other process writes.
        progress: called with directories read and in all.
    """
    artifacts = [
        *sorted(out.glob(f"????-??-??/*/{MANIFEST}")),
        *sorted(out.glob(f"{MODELS}/*/{MANIFEST}")),
    ]
    stores = [path for path in sorted((out / STORES).glob("*")) if path.is_dir()]
    total = len(artifacts) + len(stores)
    found = []
    for done, path in enumerate(artifacts, start=1):
        directory = path.parent
        remedy = f"delete {directory}, and the next run writes it again"
        if directory.parent.name == MODELS:
            remedy = f"restore {directory}, or promote another date; do not delete it"
        found += [
            f"{directory / name} is missing or damaged (its SHA-256 is not the recorded one); "
            f"{remedy}"
            for name in damaged_files(directory, thorough=True)
        ]
        progress(done, total)
    for done, store in enumerate(stores, start=len(artifacts) + 1):
        found += [str(fault) for fault in damaged_parts(store)]
        progress(done, total)
    return found

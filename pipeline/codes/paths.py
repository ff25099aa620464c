"""Where an output directory keeps its codes and codebooks, its own ones and those it has taken.

OUT/DATE/quantize/     the codes of a run
OUT/codebooks/vNNNN/   the codebooks of all runs
"""

from pathlib import Path

from pipeline.artifacts import read_manifest
from pipeline.codes.quantize_facts import QuantizeFacts

STAGE = "quantize"


def codes_directory(out: Path, day: str) -> Path:
    """Where the run of a day has its codes."""
    return out / day / STAGE


def codebook_versions(out: Path) -> Path:
    """Directory of the codebook versions: whoever reads codebooks of an output directory asks here.

    Codes that were taken from another directory have brought their codebooks along
    (`pipeline.codes.taken_codes`).
    """
    return out / "codebooks"


def coded_dates(out: Path) -> list[str]:
    """Dates of the runs with codes, ascending."""
    return sorted(path.parts[-3] for path in out.glob(f"????-??-??/{STAGE}/manifest.json"))


def codes_version(directory: Path) -> str | None:
    """Codebook version of a quantize artifact; None where there is none."""
    manifest = read_manifest(directory, QuantizeFacts)
    return None if manifest is None else manifest.facts.version

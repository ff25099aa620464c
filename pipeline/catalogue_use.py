"""Which state of items.parquet and users.parquet a stage takes, and that it stays the same.

The catalogue is rewritten every day. A published artifact keeps the one it was made with: else a
finished day would be trained again, and a training that was interrupted would start anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from embedding.errors import UserError
from pipeline.artifacts import read_manifest
from pipeline.days import catalogue_files, fingerprint
from pipeline.stages import StageOutput, StageSpec

CATALOGUE = "catalogue"
"""Input of the stages that read it."""
FILES = "files"
"""Further input of stages that read files which the catalogue names."""
CODES = "item_codes"
"""Further input of stages that read the items' codes. These follow from the catalogue, and other
codebooks are an input of their own."""

_FOLLOWING = (CATALOGUE, FILES, CODES)


def changed_while(names: str, root: Path, stage: str) -> UserError:
    """That a stage read two states of some files of the data root."""
    return UserError(
        f"{names} in {root} changed while {stage} read it, so its output would mix two states and "
        "is not published; run the same command again once the files stay as they are, and replace "
        "them by renaming, between two runs"
    )


@dataclass(frozen=True)
class CatalogueUse:
    """How the stages of one run read the catalogue of one data root."""

    root: Path
    refresh: bool = False
    """Take today's catalogue, and the files that it names, also where an artifact was made with
    others."""

    def fingerprint(self) -> str:
        """Of the files as they are now."""
        return fingerprint(catalogue_files(self.root))

    def specs(self, specs: Iterable[StageSpec]) -> Iterator[StageSpec]:
        """The same executions: published ones as they were made, others on one catalogue only."""
        for spec in specs:
            yield self._one(spec)

    def _one(self, spec: StageSpec) -> StageSpec:
        if CATALOGUE not in spec.inputs:
            return spec
        published = read_manifest(spec.directory)
        if published is not None and CATALOGUE in published.inputs and not self.refresh:
            kept = {n: published.inputs[n] for n in _FOLLOWING if n in published.inputs}
            made_with = spec.inputs | kept
            as_made = replace(spec, inputs=made_with, more_inputs=None)
            if as_made.is_current:
                return as_made
        return self._guarded(spec)

    def _guarded(self, spec: StageSpec) -> StageSpec:
        """The stage, which publishes nothing once the catalogue is another than at its begin."""
        before = self.fingerprint()

        def body(scratch: Path) -> StageOutput:
            output = spec.body(scratch)
            if self.fingerprint() != before:
                names = " or ".join(path.name for path in catalogue_files(self.root))
                raise changed_while(names, self.root, spec.name)
            return output

        return replace(spec, body=body)

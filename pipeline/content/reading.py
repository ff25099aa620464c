"""The catalogue as the stages that store content read it: checked, then digested on Ray workers.

Where images are given as paths, which files these are is an input of the stage: the fingerprint of
items.parquet does not tell that one of them is another now.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from multimodal.content_config import ContentConfig, TextTower
from multimodal.tower_files import tower_fingerprint
from pipeline.catalogue_use import FILES
from pipeline.config import DataConfig
from pipeline.content.tasks import Catalogue, Digests, check_columns, digest_row_group
from pipeline.tasks import stream_tasks


@dataclass(frozen=True)
class CheckedContent:
    """A catalogue that fits the towers."""

    config: ContentConfig
    catalogue: Catalogue
    group_rows: list[int]
    """Rows of each row group."""
    fingerprints: dict[str, str]
    """Of the towers."""
    widths: dict[str, int]
    """Of their tokens."""
    max_unreadable_share: float
    """Of the items; more images that are there and cannot be decoded fail the stage."""


def check_content(
    config: ContentConfig, root: Path, max_unreadable_share: float = 1.0
) -> CheckedContent:
    """Check everything that can be said without reading items: it needs no Ray.

    Args:
        config: names towers and columns.
        root: the data root.
        max_unreadable_share: `data.max_quarantined_share` of the recipe.

    Raises:
        UserError: a column is not there or has a wrong type, or a tower cannot be loaded or
            adapted.
    """
    from multimodal.towers import load_tower  # transformers: seconds, for content only

    catalogue = Catalogue(root, {name: tower.column for name, tower in config.towers.items()})
    group_rows = check_columns(catalogue, config.towers)
    fingerprints = {name: tower_fingerprint(name, tower) for name, tower in config.towers.items()}
    uppers = {name: load_tower(tower).upper for name, tower in config.towers.items()}
    widths = {name: upper.hidden_size for name, upper in uppers.items()}
    return CheckedContent(config, catalogue, group_rows, fingerprints, widths, max_unreadable_share)


DigestedContent = tuple[CheckedContent, pd.DataFrame]
"""A catalogue, and of `read_digests` which texts and images it holds."""


def read_digests(checked: CheckedContent) -> pd.DataFrame:
    """Columns item_id, row_group, row, and the digest of each modality; needs Ray, too."""
    groups = [i for i, rows in enumerate(checked.group_rows) if rows]
    rows = [checked.group_rows[i] for i in groups]
    found = sorted(
        stream_tasks(digest_row_group, groups, checked.catalogue, rows),
        key=lambda digests: digests.row_group,
    )
    frames = [_frame(digests) for digests in found]
    columns = ["item_id", "row_group", "row", *checked.catalogue.columns]
    empty = pd.DataFrame({name: np.empty(0, np.int64) for name in columns})
    return pd.concat(frames, ignore_index=True) if frames else empty


def _frame(digests: Digests) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "item_id": digests.item_ids_N,
            "row_group": digests.row_group,
            "row": np.arange(len(digests.item_ids_N)),
            **digests.digests_N,
        }
    )


class CatalogueReading:
    """What one execution of a stage reads, once for its inputs and its body.

    Args:
        config: names towers and columns.
        data: where the catalogue lies.
        wait: for the cluster; faults show before it is called.
    """

    def __init__(self, config: ContentConfig, data: DataConfig, wait: Callable[[], None]) -> None:
        self._config = config
        self._data = data
        self._wait = wait
        self._read: DigestedContent | None = None

    @property
    def more_inputs(self) -> Callable[[], dict[str, str]] | None:
        """Of the stage (`StageSpec.more_inputs`); None where no image is given as a path."""
        by_path = self._by_path()
        return (lambda: self._files(by_path)) if by_path else None

    def take(self) -> DigestedContent:
        """For the body of the stage."""
        read, self._read = self._read or self._digest(), None
        return read

    def _files(self, by_path: list[str]) -> dict[str, str]:
        self._read = self._digest()
        digest = hashlib.sha256()
        for column in ("item_id", *by_path):
            digest.update(np.ascontiguousarray(self._read[1][column]).data)
        return {FILES: digest.hexdigest()[:16]}

    def _digest(self) -> DigestedContent:
        checked = check_content(self._config, self._data.root, self._data.max_quarantined_share)
        self._wait()
        return checked, read_digests(checked)

    def _by_path(self) -> list[str]:
        """Modalities whose images are files that the catalogue names."""
        try:
            schema = pq.read_schema(self._data.root / Catalogue.name)
        except (pa.ArrowException, OSError):
            return []  # `check_content` says what is wrong
        return [
            name
            for name, tower in self._config.towers.items()
            if not isinstance(tower, TextTower)
            and tower.column in schema.names
            and _is_path(schema.field(tower.column).type)
        ]


def _is_path(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

"""From codes to items and back, for the run of one date."""

# Shapes: N items, L levels.

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, to_raw_ids
from multimodal.codes.tree import CodeTree
from multimodal.codes.vectors import Int32Array
from multimodal.codes.versions import CodebookManifest, find_version, load_version
from pipeline.artifacts import read_manifest
from pipeline.codes.features import CODES_FILE, read_codes
from pipeline.codes.paths import codebook_versions, coded_dates, codes_directory
from pipeline.codes.quantize_facts import QuantizeFacts
from pipeline.config import Recipe
from pipeline.recipe import RECIPE_FILE, read_recipe
from pipeline.registry import require_output
from pipeline.reports.item_cards import item_names, shown_catalogue

Prefix = tuple[int, ...]
_INTEGER = re.compile("[+-]?[0-9]{1,20}")


@dataclass(frozen=True)
class CodesOfRun:
    """The codes of all items of a run."""

    out: Path
    date: str
    facts: QuantizeFacts
    table: pa.Table
    """Ids and RQ codes of the codes artifact, by ascending item id."""
    recipe: Recipe | None
    """None where the run left none: items have no titles then."""

    @classmethod
    def read(cls, out: Path, date: str | None = None) -> "CodesOfRun":
        """The codes of a date; of the latest without one.

        Raises:
            UserError: no run of `out`, or none of that date, has codes.
        """
        require_output(out)
        known = coded_dates(out)
        if not known:
            raise UserError(
                f"--out {out} holds no run with codes; give the recipe a section codes, and run "
                f"`braid run --out {out} ...`"
            )
        chosen = date or known[-1]
        if chosen not in known:
            raise UserError(
                f"--date {chosen}: {out} holds no codes of that date (there are: "
                f"{', '.join(known)}); name one of these"
            )
        directory = codes_directory(out, chosen)
        manifest = read_manifest(directory, QuantizeFacts)
        assert manifest is not None
        table = read_codes(directory)
        ids = table["item_id"].to_numpy()
        if (ids[1:] < ids[:-1]).any():
            table = table.sort_by("item_id")
        has_recipe = (out / chosen / RECIPE_FILE).is_file()
        recipe = read_recipe(out / chosen) if has_recipe else None
        return cls(out, chosen, manifest.facts, table, recipe)

    @property
    def version(self) -> CodebookManifest:
        """The codebooks that the codes belong to.

        Raises:
            UserError: they are gone.
        """
        return find_version(codebook_versions(self.out), self.facts.version)

    @cached_property
    def item_ids(self) -> Int64Array:
        """Raw ids of the items with codes."""
        return np.asarray(self.table["item_id"].to_numpy(), np.int64)

    @cached_property
    def columns(self) -> list[str]:
        """Of the table: columns of the RQ codes, one a level."""
        names = self.table.column_names
        levels = [name for name in names if name.startswith("sid_") and name[4:].isdigit()]
        return sorted(levels, key=lambda name: int(name[4:]))

    @cached_property
    def codes(self) -> Int32Array:
        """RQ codes.

        Raises:
            UserError: there are none.
        """
        if not self.columns:
            raise UserError(
                f"the run of {self.date} has no rq codes to look up by (codes.rq=null); name an "
                "item with --item"
            )
        return np.stack([self.table[name].to_numpy() for name in self.columns], axis=1)

    @cached_property
    def tree(self) -> CodeTree:
        """From codes to positions."""
        return CodeTree.of(self.codes)

    def prefix(self, text: str) -> Prefix:
        """The beginning of a code that items have, like 3-17.

        Raises:
            UserError: it is no code, no codeword, or no item has it.
        """
        try:
            prefix = tuple(int(part) for part in text.split("-"))
        except ValueError as error:
            raise UserError(
                f"--code {text}: a code is written level by level, like 3 or 3-17"
            ) from error
        found = self.tree.items(prefix)
        for name, code in zip(self.columns, prefix, strict=False):
            size = self.facts.table_sizes[name]
            if not 0 <= code < size:
                raise UserError(f"--code {text}: {name} has the codes 0 .. {size - 1}, not {code}")
        if len(found):
            return prefix
        have = next(prefix[:end] for end in range(len(prefix), -1, -1) if self.has(prefix[:end]))
        likely = ", ".join(map(spelled, self._children(have)[:5]))
        raise UserError(f"--code {text}: no item of {self.date} has it; frequent ones: {likely}")

    def has(self, prefix: Prefix) -> bool:
        """Whether some item's code begins so."""
        return len(self.tree.items(prefix)) > 0

    def children(self, prefix: Prefix) -> dict[int, int]:
        """Codes of the next level, most items first, with their number of items."""
        return self.tree.children(prefix)

    def _children(self, prefix: Prefix) -> list[Prefix]:
        return [(*prefix, code) for code in self.children(prefix)]

    def row_of(self, item: str) -> int:
        """Position of an item, by its id as the catalogue writes it.

        Raises:
            UserError: it has no codes.
        """
        for raw_id in _raw_ids_of(item):
            at = int(np.searchsorted(self.item_ids, raw_id))
            if at < len(self.item_ids) and self.item_ids[at] == raw_id:
                return at
        why = ""
        if self.facts.num_without_vector:
            why = f" ({self.facts.num_without_vector} items of the catalogue have no vector)"
        raise UserError(
            f"--item {item}: the run of {self.date} has codes of {len(self.item_ids)} items, and "
            f"it is not among them{why}; check the id against items.parquet"
        )

    def names(self, item_ids: Iterable[int]) -> dict[int, tuple[str, str]]:
        """Id and title of items, by raw id; the raw id alone of those no longer in a catalogue."""
        wanted = np.unique(np.fromiter(item_ids, np.int64))
        found = {int(item): (str(item), "") for item in wanted}
        catalogue = shown_catalogue(self.recipe) if self.recipe else None
        if catalogue is not None and catalogue.path.is_file():
            found |= item_names(catalogue, wanted)
        return found

    def slots(self, row: int) -> list[int] | None:
        """The VQ code of an item, the nearest first; None of a run without VQ codes.

        Only this one is read: all of them are most of the file.
        """
        file = codes_directory(self.out, self.date) / CODES_FILE
        if "vq" not in pq.read_schema(file).names:
            return None
        is_own = pc.field("item_id") == int(self.item_ids[row])
        found: list[list[int]] = pq.read_table(file, columns=["vq"], filters=is_own)[0].to_pylist()
        return found[0]

    def neighbours(self, row: int) -> list[int]:
        """Raw ids of the items that a VQ code lists, the nearest first.

        Raises:
            UserError: the codebooks are gone.
        """
        items = load_version(codebook_versions(self.out), self.facts.version).items
        assert items is not None
        return [int(items.item_ids_N[slot]) for slot in self.slots(row) or ()]


def _raw_ids_of(item: str) -> list[int]:
    """Raw ids that an item may have whose id is written so: as a string, and as an integer."""
    columns = [pa.array([item])]
    if _INTEGER.fullmatch(item) and -(1 << 63) <= int(item) < 1 << 64:
        kind = pa.int64() if int(item) < 1 << 63 else pa.uint64()
        columns.append(pa.array([int(item)], kind))
    return [to_raw_ids(column)[0].as_py() for column in columns]


def spelled(prefix: Iterable[int]) -> str:
    """A code as a person writes it: 3-17."""
    return "-".join(map(str, prefix))

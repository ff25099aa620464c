"""Codes of the run before, for items whose vectors are the same: nothing is looked up for those.

Beside `codes.parquet` the quantize stage writes `digests.parquet`: of every item a digest of its
vector, and what its codes were looked up with.
"""

# Shapes: N items, L levels, k neighbours.

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.raw_ids import Int64Array
from embedding.samples import CODEBOOKS
from multimodal.codes.config import CODES_FORMAT, Vq
from multimodal.codes.vector_quantizer import FREE
from multimodal.codes.vectors import Int32Array
from pipeline.codes.features import read_codes

DIGESTS_FILE = "digests.parquet"
_VQ = b"vq"
"""Key of the file's metadata: how VQ codes were looked up."""
_FORMAT = b"format"
"""Key of the file's metadata: of how codes are made; those of another are not kept."""


@dataclass(frozen=True)
class KeptCodes:
    """Codes, and of which vectors they are."""

    codes: pa.Table
    digests: pa.Table
    """item_id and digest, in the order of the codes."""

    @classmethod
    def read(cls, directory: Path) -> "KeptCodes | None":
        """Of a quantize artifact; None where it does not say which vectors its codes are of."""
        if not (directory / DIGESTS_FILE).exists():
            return None
        return cls(read_codes(directory, "vq"), pq.read_table(directory / DIGESTS_FILE))

    def places(
        self, item_ids_N: Int64Array, digests_N: Int64Array, codebooks: str, vq: Vq | None
    ) -> Int64Array:
        """Row of the codes of each item (N,) that hold for it still; -1: look them up.

        Args:
            item_ids_N: the items.
            digests_N: of their vectors.
            codebooks: that are looked up in: version and fingerprint.
            vq: how VQ codes are looked up; None: RQ codes only.
        """
        places_N = np.full(len(item_ids_N), -1)
        said = self.digests.schema.metadata or {}
        if said.get(_FORMAT) != b"%d" % CODES_FORMAT:
            return places_N
        if said.get(CODEBOOKS) != codebooks.encode():
            return places_N
        if vq is not None and said.get(_VQ) != _look_up(vq):
            return places_N
        ids, digests = (self.digests[name].to_numpy() for name in ("item_id", "digest"))
        _, now, before = np.intersect1d(item_ids_N, ids, return_indices=True)
        same = digests_N[now] == digests[before]
        places_N[now[same]] = before[same]
        return places_N

    def residual(self, rows: Int64Array) -> Int32Array:
        """RQ codes of some rows."""
        names = [n for n in self.codes.column_names if n[:4] == "sid_" and n[4:].isdigit()]
        levels = [self.codes[f"sid_{level}"].to_numpy()[rows] for level in range(len(names))]
        return np.stack(levels, axis=1).astype(np.int32)

    def neighbours(self, rows: Int64Array, top_k: int) -> Int32Array:
        """VQ codes (rows, top_k) of some rows, `FREE` behind the last one."""
        lists = self.codes["vq"].take(pa.array(rows)).combine_chunks()
        lengths = np.asarray(lists.value_lengths(), np.int64)
        found_Nk = np.full((len(rows), top_k), FREE, np.int32)
        found_Nk[np.arange(top_k) < lengths[:, None]] = lists.flatten().to_numpy()
        return found_Nk


def write_digests(
    directory: Path, item_ids_N: Int64Array, digests_N: Int64Array, codebooks: str, vq: Vq | None
) -> None:
    """Write `DIGESTS_FILE` beside the codes of the same items."""
    table = pa.table({"item_id": item_ids_N, "digest": digests_N})
    said = {_FORMAT: b"%d" % CODES_FORMAT, CODEBOOKS: codebooks.encode()} | (
        {_VQ: _look_up(vq)} if vq is not None else {}
    )
    pq.write_table(table.replace_schema_metadata(said), directory / DIGESTS_FILE)


def _look_up(vq: Vq) -> bytes:
    return json.dumps(vq.model_dump(mode="json", exclude={"max_items"}), sort_keys=True).encode()

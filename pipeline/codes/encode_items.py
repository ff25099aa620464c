"""Codes of all items of a day: kept from the day before, looked up here, or on Ray workers.

A code depends on the vector and the codebooks alone (`multimodal.codes.exact_lookup`), so neither
what is kept nor how the rest is cut into pieces can be seen in the result.
"""

# Shapes: N items of the day, B of a piece, L levels, k neighbours, D vector dim.

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from embedding.raw_ids import Int64Array
from multimodal.codes.config import Codes, EncodeWorkers, Vq
from multimodal.codes.residual_quantizer import CPU
from multimodal.codes.store import Codebooks
from multimodal.codes.vector_quantizer import FREE, ItemNeighbours
from multimodal.codes.vectors import FloatArray, Int32Array
from pipeline.codes.item_vectors import ItemVectors


@dataclass(frozen=True)
class Machines:
    """What computes."""

    run: "RunPieces | None" = None
    """Looks codes of many items up on workers; None: all are looked up here."""
    device: torch.device = CPU
    """For the arithmetic here."""


HERE = Machines()


@dataclass(frozen=True)
class Books:
    """Codebooks to look codes up in."""

    codebooks: Codebooks
    name: str = ""
    """Version and fingerprint; empty while they are not published."""
    directory: Path | None = None
    """Where they are published."""


@dataclass(frozen=True)
class LookUp:
    """What a worker needs to know, whichever piece it gets."""

    codebooks: Path
    """Directory of the codebooks."""
    with_rq: bool
    vq: Vq | None
    """None: no VQ codes."""
    index: Path | None
    """Of the VQ codes, where it is approximate."""


@dataclass(frozen=True)
class Piece:
    """Items of one task."""

    own_B: Int64Array
    """Their own VQ slots."""
    vectors_BD: FloatArray | None
    """None: these rows of the file."""
    file: Path | None = None
    rows_B: Int64Array | None = None

    def read(self) -> FloatArray:
        """The vectors."""
        if self.vectors_BD is not None:
            return self.vectors_BD
        assert self.file is not None
        return np.asarray(np.load(self.file, mmap_mode="r")[self.rows_B])


@dataclass(frozen=True)
class Encoded:
    """Codes that were asked for."""

    codes_BL: Int32Array | None
    near_Bk: Int32Array | None
    """Slots of the nearest other items, the nearest first; `FREE` behind the last one."""

    def fill(self, rows: Int64Array, codes: "Encoded") -> None:
        """Write the codes of some rows."""
        if self.codes_BL is not None and codes.codes_BL is not None:
            self.codes_BL[rows] = codes.codes_BL
        if self.near_Bk is not None and codes.near_Bk is not None:
            self.near_Bk[rows] = codes.near_Bk


class CodeAssigner:
    """Assigns codes to vectors; what that takes is loaded once."""

    def __init__(
        self,
        codebooks: Codebooks,
        *,
        with_rq: bool,
        near: ItemNeighbours | None,
        device: torch.device,
    ) -> None:
        """`near`: None without VQ codes."""
        residual = codebooks.residual if with_rq else None
        self._residual = residual.to(device) if residual is not None else None
        self._near = near
        self._device = device

    @classmethod
    def load(cls, look_up: LookUp, device: torch.device) -> "CodeAssigner":
        """On a worker.

        Raises:
            UserError: the codebooks are missing or damaged.
        """
        codebooks, near = Codebooks.load(look_up.codebooks), None
        if look_up.vq is not None:
            assert codebooks.items is not None
            near = codebooks.items.neighbours(look_up.vq, device, look_up.index)
        return cls(codebooks, with_rq=look_up.with_rq, near=near, device=device)

    def __call__(self, piece: Piece) -> Encoded:
        """The codes of a piece.

        Raises:
            UserError: vectors of another dimension, or with NaN or infinity.
        """
        vectors_BD = piece.read()
        return Encoded(
            None if self._residual is None else self._residual.encode(vectors_BD, self._device),
            None if self._near is None else self._near.encode(vectors_BD, piece.own_B),
        )


RunPieces = Callable[
    [Iterator[Piece], Sequence[int], LookUp, EncodeWorkers], Iterator[tuple[int, Encoded]]
]
"""Runs pieces, which have so many items each, on workers; numbers and codes in any order."""


class DayEncoder:
    """Codes of all items of a day, with any codebooks."""

    def __init__(
        self,
        config: Codes,
        items: ItemVectors,
        scratch: Path,
        machines: Machines = HERE,
    ) -> None:
        """Nothing is looked up.

        Args:
            config: of the recipe.
            items: of the day.
            scratch: an existing directory that workers see, too.
            machines: where codes are looked up.
        """
        self.config = config
        self.items = items
        self.device = machines.device
        self._run = machines.run
        self._scratch = scratch
        self.num_encoded = 0
        """Items that the last call looked up which had anything to look up."""

    def encode(self, books: Books, *, with_rq: bool = True, with_vq: bool = True) -> Encoded:
        """The codes that the codebooks and the config both have, as far as they are asked for."""
        items, num_items = self.items, len(self.items.item_ids_N)
        residual = books.codebooks.residual if with_rq else None
        slots = books.codebooks.items if with_vq else None
        vq = self.config.vq if slots is not None else None
        codes_NL = near_Nk = None
        own_N = np.full(num_items, FREE)
        if residual is not None:
            codes_NL = np.empty((num_items, len(residual.level_sizes)), np.int32)
        if slots is not None and vq is not None:
            near_Nk = np.empty((num_items, vq.top_k), np.int32)
            own_N = slots.slots_of(items.item_ids_N)
        found = Encoded(codes_NL, near_Nk)
        if codes_NL is None and near_Nk is None:
            return found
        rows = self._keep(books, vq, found)
        self.num_encoded = len(rows)
        if len(rows):
            for some, codes in self._look_up(books, rows, own_N, with_rq=with_rq, vq=vq):
                found.fill(some, codes)
        return found

    def _keep(self, books: Books, vq: Vq | None, found: Encoded) -> Int64Array:
        """Fill in the codes that hold still; the rows of the others."""
        items = self.items
        if items.kept is None or not books.name:
            return np.arange(len(items.item_ids_N))
        kept = items.kept
        places_N = kept.places(items.item_ids_N, items.digests, books.name, vq)
        rows = np.flatnonzero(places_N >= 0)
        places = places_N[rows]
        codes_BL = None if found.codes_BL is None else kept.residual(places)
        near_Bk = None if vq is None else kept.neighbours(places, vq.top_k)
        found.fill(rows, Encoded(codes_BL, near_Bk))
        return np.flatnonzero(places_N < 0)

    def _look_up(
        self, books: Books, rows: Int64Array, own_N: Int64Array, *, with_rq: bool, vq: Vq | None
    ) -> Iterator[tuple[Int64Array, Encoded]]:
        """Rows of a piece, and their codes."""
        near, size = None, self.config.encode.items_per_task
        if vq is not None:
            assert books.codebooks.items is not None
            near = books.codebooks.items.neighbours(vq, self.device)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if self._run is None or len(parts) == 1:
            assign = CodeAssigner(books.codebooks, with_rq=with_rq, near=near, device=self.device)
            for part in parts:
                vectors_BD = _some(self.items.vectors_ND, part)
                yield part, assign(Piece(own_N[part], vectors_BD))
            return
        with ExitStack() as after:
            folder = self._scratch / ".look_up"
            folder.mkdir()
            after.callback(shutil.rmtree, folder, ignore_errors=True)
            if books.directory is None:
                books.codebooks.save(folder)
            index = None if near is None else near.save(folder / "index.faiss")
            look_up = LookUp(
                (books.directory or folder).absolute(),
                with_rq,
                vq,
                None if index is None else index.absolute(),
            )
            del near
            pieces = (self._piece(part, own_N) for part in parts)
            sizes = [len(part) for part in parts]
            for number, found in self._run(pieces, sizes, look_up, self.config.encode):
                yield parts[number], found

    def _piece(self, rows: Int64Array, own_N: Int64Array) -> Piece:
        if self.items.file is None:
            return Piece(own_N[rows], _some(self.items.vectors_ND, rows))
        return Piece(own_N[rows], None, self.items.file.absolute(), rows)


def _some(vectors_ND: FloatArray, rows: Int64Array) -> FloatArray:
    """Some ascending rows; a view where they are consecutive, for it may be a file."""
    first, last = int(rows[0]), int(rows[-1])
    return vectors_ND[first : last + 1] if last - first + 1 == len(rows) else vectors_ND[rows]

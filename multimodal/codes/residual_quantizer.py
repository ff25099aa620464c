"""Residual quantization: L codebooks, each for what the levels before left (QARM's RQ codes).

    x  --nearest of level 0-->  code 0,  x - c0  --nearest of level 1-->  code 1,  x - c0 - c1 ...

Codebooks are frozen once fitted: a new item needs its vector and a look-up, no refit.
"""

# Shapes: N items, B items of a block, D vector dim, L K-means levels, K codewords per level.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.codes.exact_lookup import exact_codewords
from multimodal.codes.fsq import FsqLevel
from multimodal.codes.vectors import Float32Array, FloatArray, Int32Array, blocks, check_finite

Float64Array = np.ndarray[Any, np.dtype[np.float64]]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ResidualCodebooks:
    """Fitted codebooks of all levels."""

    codebooks_LKD: Tensor
    fsq: FsqLevel | None = None
    """A further level behind the K-means levels."""

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return int(self.codebooks_LKD.shape[2])

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Codes of every level, FSQ included."""
        num_levels, codebook_size, _ = self.codebooks_LKD.shape
        last = (self.fsq.num_codes,) if self.fsq else ()
        return (*(codebook_size,) * num_levels, *last)

    def to(self, device: torch.device) -> "ResidualCodebooks":
        """On another device."""
        return ResidualCodebooks(
            self.codebooks_LKD.to(device), self.fsq.to(device) if self.fsq else None
        )

    def encode(self, vectors_ND: FloatArray, device: torch.device = CPU) -> Int32Array:
        """Codes (N, levels) of vectors in memory or in a memory-mapped file.

        Raises:
            UserError: vectors of another dimension, or with NaN or infinity.
        """
        codes = np.empty((len(vectors_ND), len(self.level_sizes)), np.int32)
        for start, codes_BL, _ in self._encode_blocks(vectors_ND, device):
            codes[start : start + len(codes_BL)] = codes_BL.cpu().numpy()
        return codes

    def squared_errors(self, vectors_ND: FloatArray, device: torch.device = CPU) -> Float64Array:
        """Mean squared distance of vectors to their reconstruction, (levels + 1,).

        Entry l uses the first l levels, so the first is the mean squared length.
        """
        totals = np.zeros(len(self.level_sizes) + 1)
        for _, _, errors in self._encode_blocks(vectors_ND, device):
            totals += errors.cpu().numpy()
        return totals / max(1, len(vectors_ND))

    def errors_of_codes(
        self, vectors_ND: FloatArray, codes_NL: Int32Array, device: torch.device = CPU
    ) -> Float64Array:
        """What `squared_errors` says of vectors whose codes are known: nothing is looked up."""
        self.check_dim(vectors_ND)
        books, totals = self.to(device), np.zeros(len(self.level_sizes) + 1)
        for start, block_BD in blocks(vectors_ND):
            code_BL = torch.from_numpy(codes_NL[start : start + len(block_BD)]).to(device).long()
            left_BD = torch.from_numpy(block_BD).to(device)
            errors = [left_BD.square().sum(dtype=torch.float64)]
            for level, codebook_KD in enumerate(books.codebooks_LKD):
                left_BD = left_BD - codebook_KD[code_BL[:, level]]
                errors.append(left_BD.square().sum(dtype=torch.float64))
            if books.fsq:
                left_BD = left_BD - books.fsq.decode(code_BL[:, -1])
                errors.append(left_BD.square().sum(dtype=torch.float64))
            totals += torch.stack(errors).cpu().numpy()
        return totals / max(1, len(vectors_ND))

    def decode(self, codes_NL: Int32Array) -> Float32Array:
        """The vectors (N, D) that codes stand for."""
        codes = torch.from_numpy(np.asarray(codes_NL, np.int64))
        x_ND = torch.zeros(len(codes), self.dim)
        books = self.to(CPU)
        for level, codebook_KD in enumerate(books.codebooks_LKD):
            x_ND += codebook_KD[codes[:, level]]
        if books.fsq:
            x_ND += books.fsq.decode(codes[:, -1])
        return x_ND.numpy()

    def _encode_blocks(
        self, vectors_ND: FloatArray, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, codes (B, levels) and summed squared errors (levels + 1,) of each block."""
        self.check_dim(vectors_ND)
        books = self.to(device)
        for start, block_BD in blocks(vectors_ND):
            check_finite(block_BD, start)
            codes_BL, errors = books.encode_tensor(torch.from_numpy(block_BD).to(device))
            yield start, codes_BL, errors

    def encode_tensor(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, levels) and the squared errors before level 0 and after every level, summed."""
        residual_BD = x_BD
        codes, errors = [], [residual_BD.square().sum(dtype=torch.float64)]
        for codebook_KD in self.codebooks_LKD:
            code_B = exact_codewords(residual_BD, codebook_KD)
            residual_BD = residual_BD - codebook_KD[code_B]
            codes.append(code_B)
            errors.append(residual_BD.square().sum(dtype=torch.float64))
        if self.fsq:
            code_B = self.fsq.encode(residual_BD)
            codes.append(code_B)
            left = residual_BD - self.fsq.decode(code_B)
            errors.append(left.square().sum(dtype=torch.float64))
        return torch.stack(codes, 1), torch.stack(errors)

    def check_dim(self, vectors_ND: FloatArray) -> None:
        """Refuse vectors of another dimension.

        Raises:
            UserError: the codebooks were fitted to vectors of another width.
        """
        if vectors_ND.ndim != 2 or vectors_ND.shape[1] != self.dim:
            raise UserError(
                f"the codebooks were fitted to vectors of {self.dim} dimensions, these have shape "
                f"{vectors_ND.shape}; use the encoder they were fitted with, or fit new codebooks"
            )

"""Codebooks as files: safetensors, no pickle; the fingerprint is a hash of what they hold."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedding.errors import UserError
from multimodal.codes.fsq import FsqLevel
from multimodal.codes.residual_quantizer import ResidualCodebooks
from multimodal.codes.vector_quantizer import ItemCodebook
from multimodal.codes.vectors import Int64Array

FILE = "codebooks.safetensors"


@dataclass(frozen=True)
class Codebooks:
    """Everything that is frozen between two refits."""

    residual: ResidualCodebooks | None = None
    items: ItemCodebook | None = None
    """Of the VQ codes."""
    fitted_ids: Int64Array | None = None
    """Items that were fitted, ascending: all others are new to these codebooks."""

    @property
    def table_sizes(self) -> dict[str, int]:
        """Codes by code column: `sid_0`, `sid_1`, ... and `vq`; a table needs one row more."""
        sizes: dict[str, int] = {}
        if self.residual:
            sizes |= {f"sid_{i}": size for i, size in enumerate(self.residual.level_sizes)}
        if self.items:
            sizes["vq"] = self.items.num_codes
        return sizes

    @property
    def fingerprint(self) -> str:
        """Equal for equal codebooks, on every machine."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def save(self, directory: Path) -> None:
        """Write `FILE`."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, directory / FILE)

    @classmethod
    def load(cls, directory: Path) -> "Codebooks":
        """Read `FILE`.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            return _from_tensors(load_file(directory / FILE))
        except (OSError, SafetensorError, KeyError) as error:
            raise _unreadable(directory, error) from error

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        if self.residual:
            tensors["residual.codebooks_LKD"] = self.residual.codebooks_LKD
            if self.residual.fsq:
                tensors["fsq.weights_DP"] = self.residual.fsq.weights_DP
                tensors["fsq.values_PV"] = self.residual.fsq.values_PV
        if self.items:
            tensors["items.ids_N"] = torch.from_numpy(self.items.item_ids_N)
            tensors["items.vectors_ND"] = torch.from_numpy(self.items.vectors_ND)
        if self.fitted_ids is not None:
            tensors["fitted_ids"] = torch.from_numpy(self.fitted_ids)
        return tensors


def read_fitted_ids(directory: Path) -> Int64Array | None:
    """`Codebooks.fitted_ids` of a file, without the rest of it.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        with safe_open(directory / FILE, framework="np") as file:
            names = [*file.keys()]
            found: Int64Array | None = (
                file.get_tensor("fitted_ids") if "fitted_ids" in names else None
            )
            return found
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory, error) from error


def _unreadable(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"{directory / FILE} cannot be read as codebooks ({error}); restore the file; "
        f"{fitted_anew(directory.name)}"
    )


def fitted_anew(version: str) -> str:
    """What helps where a version is damaged or gone and there is no copy of it."""
    return (
        f"without a copy, leave codes.version out and delete OUT/DATE/quantize of all runs whose "
        f"codes are of {version} or of versions that go on with it, and the next run fits new "
        "codebooks"
    )


def _from_tensors(tensors: dict[str, Tensor]) -> Codebooks:
    residual = items = fsq = None
    if "fsq.weights_DP" in tensors:
        fsq = FsqLevel(tensors["fsq.weights_DP"], tensors["fsq.values_PV"])
    if "residual.codebooks_LKD" in tensors:
        residual = ResidualCodebooks(tensors["residual.codebooks_LKD"], fsq)
    if "items.ids_N" in tensors:
        items = ItemCodebook(tensors["items.ids_N"].numpy(), tensors["items.vectors_ND"].numpy())
    fitted = tensors["fitted_ids"].numpy() if "fitted_ids" in tensors else None
    return Codebooks(residual, items, fitted)

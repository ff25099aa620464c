"""Texts and images of items as inputs of the towers; what cannot be used is counted by cause.

Shapes: N items of a batch, M usable ones among them, L token positions, S image size.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from embedding.errors import UserError
from multimodal.content_config import ImageTower, TextTower
from multimodal.images import MISSING, read_image, square_pixels
from multimodal.tower_files import TINY_VOCABULARY, Tower, model_directory

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_WORD = re.compile(r"\w+")
_FIRST_TINY_WORD = 1  # 0 is padding
_PLAIN_MEAN_STD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class PreparedInputs:
    """Inputs of the usable items of a batch."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model; M rows, in the order of the items."""
    mask_ML: Tensor | None
    """True where there is a token; None: everywhere."""
    faults: list[str | None]
    """N of them: why an item has no input; None where it has."""
    is_cut: list[bool]
    """M of them: the text went on beyond `max_tokens`."""


class Preparer(Protocol):
    """Makes inputs of a batch of values, as they stand in items.parquet."""

    def __call__(self, values: Sequence[Any]) -> PreparedInputs:
        """Inputs of those that can be used."""
        ...


def build_preparer(tower: Tower, root: Path) -> Preparer:
    """The preparation that a tower's model needs.

    Args:
        tower: the recipe's.
        root: the data root, which image paths are relative to.

    Raises:
        UserError: the model comes without the files that describe its inputs.
    """
    if isinstance(tower, TextTower):
        return TextPreparer(tower)
    return ImagePreparer(tower, root)


# --- text ----------------------------------------------------------------------------------------


class TextPreparer:
    """Tokenises texts with the model's own tokeniser; tiny models hash words."""

    def __init__(self, tower: TextTower) -> None:
        self.max_tokens = tower.max_tokens
        directory = model_directory(tower)
        self._tokenizer: Any = None
        if directory is not None:
            if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
                raise UserError(
                    f"tower model {tower.model!r}: {directory} has no tokenizer; add the files "
                    f"that its save_pretrained writes (one of {', '.join(_TOKENIZER_FILES)})"
                )
            self._tokenizer = AutoTokenizer.from_pretrained(directory)

    def __call__(self, values: Sequence[str | None]) -> PreparedInputs:
        """Token ids and mask of the texts that are not blank."""
        faults = [None if value and value.strip() else MISSING for value in values]
        texts = [value for value, fault in zip(values, faults, strict=True) if fault is None]
        words = self._tokenize([text for text in texts if text])
        is_cut = [len(ids) > self.max_tokens for ids in words]
        ids_ML = torch.zeros(len(words), max([len(ids) for ids in words] + [1]), dtype=torch.int64)
        ids_ML = ids_ML[:, : self.max_tokens]
        mask_ML = torch.zeros_like(ids_ML, dtype=torch.bool)
        for row, ids in enumerate(words):
            kept = self._cut(ids)
            ids_ML[row, : len(kept)] = torch.tensor(kept)
            mask_ML[row, : len(kept)] = True
        inputs = {"input_ids": ids_ML, "attention_mask": mask_ML.long()}
        return PreparedInputs(inputs, mask_ML, list(faults), is_cut)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer is None:
            return [_tiny_tokens(text) for text in texts]
        encoded: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        return encoded

    def _cut(self, ids: list[int]) -> list[int]:
        """The first tokens, closed by the end token that the model expects."""
        if len(ids) <= self.max_tokens:
            return ids
        if self._tokenizer is not None and ids[-1] == self._tokenizer.sep_token_id:
            return [*ids[: self.max_tokens - 1], ids[-1]]
        return ids[: self.max_tokens]


def _tiny_tokens(text: str) -> list[int]:
    words = _WORD.findall(text.lower()) or [text.strip()]
    return [
        _FIRST_TINY_WORD + zlib.crc32(word.encode()) % (TINY_VOCABULARY - _FIRST_TINY_WORD)
        for word in words
    ]


# --- images --------------------------------------------------------------------------------------


class ImagePreparer:
    """Decodes images, one at a time, to a square of the model's size and range."""

    def __init__(self, tower: ImageTower, root: Path) -> None:
        self.tower = tower
        self.root = root
        mean, std = _mean_std(model_directory(tower))
        self._mean_C11 = torch.tensor(mean).reshape(3, 1, 1)
        self._std_C11 = torch.tensor(std).reshape(3, 1, 1)

    def __call__(self, values: Sequence[bytes | str | None]) -> PreparedInputs:
        """Pixels (M, 3, S, S) of the images that can be decoded."""
        size = self.tower.image_size
        decoded = [self._decode(value) for value in values]
        images = [image for image in decoded if not isinstance(image, str)]
        pixels_MSSC = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
        pixels_MCSS = torch.from_numpy(pixels_MSSC).permute(0, 3, 1, 2).float() / 255
        inputs = {"pixel_values": (pixels_MCSS - self._mean_C11) / self._std_C11}
        faults = [image if isinstance(image, str) else None for image in decoded]
        return PreparedInputs(inputs, None, faults, [False] * len(images))

    def _decode(self, value: bytes | str | None) -> np.ndarray | str:
        if not value:
            return MISSING
        size = self.tower.image_size
        image = read_image(value, self.root, size, self.tower.max_pixels)
        return image if isinstance(image, str) else square_pixels(image, size)


def _mean_std(directory: Path | None) -> tuple[Sequence[float], Sequence[float]]:
    """Of the model's training; plain values where it does not say."""
    path = None if directory is None else directory / "preprocessor_config.json"
    if path is None or not path.is_file():
        return _PLAIN_MEAN_STD
    described = json.loads(path.read_text())
    return described.get("image_mean", _PLAIN_MEAN_STD[0]), described.get(
        "image_std", _PLAIN_MEAN_STD[1]
    )

"""Content vectors of items that training did not know, from a bundle alone.

    text, image -> prepared inputs -> lower layers -> rounded as stored tokens
                -> top layers, LoRA merged -> fusion -> vector (D)

Every part is what the content stage and training run, so an item gets the vector that it would
have had, had training known it and learned nothing from it.

Shapes: N items of a batch, D content dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy.bundle import load_tensors
from deploy.encoder_files import HEAD_FILE, TOWERS_PREFIX, input_tower, model_tower
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import ContentEncoder
from multimodal.item_inputs import build_preparer
from multimodal.item_tokens import LowerEncoder
from multimodal.token_batch import TokenBatch
from multimodal.towers import split_tower

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncodedContent:
    """Vectors of a batch of items."""

    vectors_ND: Tensor
    faults: dict[str, list[str | None]]
    """By modality, N of them: why an item has no tokens of it; None where it has."""


class ItemEncoder:
    """Encodes items on the CPU, one batch at a time.

    Args:
        directory: a bundle whose files have been checked.
        config: of its recipe.
        root: what image paths are relative to.

    Raises:
        UserError: the encoder cannot be loaded.
    """

    def __init__(self, directory: Path, config: ContentConfig, root: Path) -> None:
        self.lower: dict[str, LowerEncoder] = {}
        uppers = {}
        for name, tower in config.towers.items():
            split = split_tower(model_tower(directory, name, tower))
            prepare = build_preparer(input_tower(directory, name, tower), root)
            self.lower[name] = LowerEncoder(split, prepare, tower, _CPU)
            uppers[name] = split.upper
        self.encoder = ContentEncoder(config, uppers).requires_grad_(False).eval()
        found = self.encoder.load_state_dict(load_tensors(directory / HEAD_FILE), strict=False)
        lacking = [name for name in found.missing_keys if not name.startswith(TOWERS_PREFIX)]
        assert not lacking, lacking
        assert not found.unexpected_keys, found.unexpected_keys

    @torch.no_grad()
    def __call__(self, values: Mapping[str, Sequence[Any]]) -> EncodedContent:
        """Encode items.

        Args:
            values: by modality, of all N items, as they stand in items.parquet.
        """
        encoded = {name: lower(values[name]) for name, lower in self.lower.items()}
        tokens = TokenBatch({name: items.of_all_items() for name, items in encoded.items()})
        faults = {name: items.faults for name, items in encoded.items()}
        return EncodedContent(self.encoder(tokens), faults)

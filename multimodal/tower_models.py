"""Pretrained models of the towers: where they lie, what identifies them, and the tiny ones.

A model is a directory with config.json and weights, whatever way the recipe names it; `tiny` models
are small random transformers built here from a fixed seed.
"""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, ViTConfig
from transformers import logging as transformers_logging

from embedding.errors import UserError
from multimodal.content_config import TINY, ImageTower, TextTower

TOKENS_FORMAT = 1
"""Of stored tokens and of how inputs are prepared."""

TINY_VOCABULARY = 4096
TINY_PATCH = 8
_TINY_SEED = 20240406
_TINY_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    # Wide enough that random layers mix tokens; the default of 0.02 leaves them almost identity.
    "initializer_range": 0.15,
}

_WEIGHTS = ("*.safetensors", "*.bin")
_FILES = ("*.json", "*.txt", "*.model", *_WEIGHTS)

Tower = TextTower | ImageTower


def model_directory(tower: Tower) -> Path | None:
    """Where the model's files lie; None for a tiny tower. A hub model is downloaded.

    Raises:
        UserError: there are no such files.
    """
    name = tower.model
    if name == TINY:
        return None
    if name.startswith("package:"):
        directory = _package_directory(name)
    elif Path(name).is_dir():
        directory = Path(name)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"tower model {name!r}: there is no such directory; give the path of one with "
            f"config.json and weights, package:NAME/DIR, a hub id OWNER/NAME, or {TINY!r}"
        )
    else:
        directory = _download(name, tower.revision)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"tower model {name!r}: {directory} has no config.json; give the directory that "
            "save_pretrained wrote"
        )
    return directory


def _package_directory(name: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        directory = Path(str(files(package).joinpath(inside)))
    except ModuleNotFoundError as error:
        raise UserError(
            f"tower model {name!r}: the Python package {package} is not installed; `make towers` "
            "installs those that the built-in recipes use"
        ) from error
    if not directory.is_dir():
        raise UserError(
            f"tower model {name!r}: package {package} has no directory {inside!r}; it has "
            f"{sorted(path.name for path in directory.parent.glob('*/'))}"
        )
    return directory


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"tower model {name!r} is no directory, and the model hub did not give it "
            f"({str(error).splitlines()[0]}); check the name, or give a local directory"
        ) from error


def model_files(tower: Tower) -> list[Path]:
    """Files that the tower's outputs depend on, by name; none for a tiny tower.

    Raises:
        UserError: there are no such files.
    """
    directory = model_directory(tower)
    if directory is None:
        return []
    return sorted({path for pattern in _FILES for path in directory.glob(pattern)})


def tower_fingerprint(modality: str, tower: Tower) -> str:
    """Identity of the tower's stored tokens: model, layer, preprocessing and precision.

    Equal for equal files, wherever they lie.

    Raises:
        UserError: the model's files are not there.
    """
    size = tower.max_tokens if isinstance(tower, TextTower) else tower.image_size
    described = {
        "format": TOKENS_FORMAT,
        "modality": modality,
        "tiny": _TINY_SIZE if tower.model == TINY else None,
        "files": {path.name: _sha256(path) for path in model_files(tower)},
        "layers_in_step": tower.layers_in_step,
        "size": size,
        "precision": tower.precision,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(tower: Tower) -> nn.Module:
    """The whole pretrained model, in float32 and evaluation mode.

    Raises:
        UserError: its files are not there or cannot be read.
    """
    directory = model_directory(tower)
    if directory is None:
        return _tiny_model(tower)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory)
        model = AutoModel.from_pretrained(directory, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"tower model {tower.model!r}: {directory} cannot be loaded "
            f"({str(error).splitlines()[0]}); check that its files are complete"
        ) from error
    return model.eval()


def _tiny_model(tower: Tower) -> nn.Module:
    """A small random transformer: the same weights whenever and wherever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TINY_SEED)
        if isinstance(tower, TextTower):
            text = BertConfig(
                vocab_size=TINY_VOCABULARY,
                max_position_embeddings=tower.max_tokens,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **_TINY_SIZE,
            )
            return AutoModel.from_config(text, dtype=torch.float32).eval()
        if tower.image_size % TINY_PATCH:
            raise UserError(
                f"image_size={tower.image_size} is no multiple of the tiny tower's patches of "
                f"{TINY_PATCH} pixels; use {tower.image_size + -tower.image_size % TINY_PATCH}"
            )
        image = ViTConfig(image_size=tower.image_size, patch_size=TINY_PATCH, **_TINY_SIZE)
        return AutoModel.from_config(image, dtype=torch.float32).eval()

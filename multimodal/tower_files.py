"""Files of the towers' pretrained models: where they lie and what identifies them.

A model is a directory with config.json and weights, whatever way the recipe names it. Imports
neither torch nor transformers.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from embedding.errors import UserError
from embedding.files import file_sha256
from multimodal.content_config import TINY, ImageTower, TextTower

TOKENS_FORMAT = 2
"""Of stored tokens and of how inputs are prepared."""

TINY_VOCABULARY = 4096
TINY_PATCH = 8
TINY_SIZE: dict[str, Any] = {
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
    elif is_on_hub(tower):
        require_commit(tower)
        directory = _download(name, tower.revision)
    else:
        raise UserError(
            f"tower model {name!r}: there is no such directory; give the path of one with "
            f"config.json and weights, package:NAME/DIR, a hub id OWNER/NAME, or {TINY!r}"
        )
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


def input_files(tower: Tower) -> list[Path]:
    """Those of `model_files` that say how inputs are prepared: of a tokenizer, a preprocessor.

    Raises:
        UserError: there are no such files.
    """
    model = ("config.json", "*.index.json", *_WEIGHTS)
    return [p for p in model_files(tower) if not any(p.match(pattern) for pattern in model)]


def is_on_hub(tower: Tower) -> bool:
    """True if the model is named by a hub id, and so may have to be downloaded."""
    name = tower.model
    is_local = name == TINY or name.startswith(("package:", ".", "/", "~")) or Path(name).is_dir()
    return not is_local and name.count("/") == 1


def require_commit(tower: Tower) -> None:
    """Refuse a hub model whose files may change: looks at the recipe alone.

    Raises:
        UserError: it is named without its commit.
    """
    if is_on_hub(tower) and tower.revision is None:
        raise UserError(
            f"tower model {tower.model!r} is a hub id, whose files may change from one day to the "
            "next: set `revision` beside `model` to the commit (40 hexadecimal digits, as the "
            "history of the model's files on the hub shows them), or give a local directory"
        )


def require_files(tower: Tower) -> None:
    """Refuse a model whose files are not there or may change, without loading or downloading it.

    Raises:
        UserError: it is a hub id without its commit, or there are no such files.
    """
    require_commit(tower)
    if not is_on_hub(tower):  # else it is downloaded where it is read
        model_directory(tower)


def tower_fingerprint(modality: str, tower: Tower) -> str:
    """Identity of the tower's stored tokens: model, layer, preprocessing and precision.

    Equal for equal files, wherever they lie.

    Raises:
        UserError: the model's files are not there.
    """
    described = {
        "format": TOKENS_FORMAT,
        **_model(modality, tower),
        "inputs": input_settings(tower),
        "precision": tower.precision,
    }
    return _fingerprint(described)


def model_identities(towers: Mapping[str, Tower]) -> dict[str, int]:
    """Of each tower what its LoRA is fitted to, as an int64: the model's files and the cut.

    Not how inputs are prepared and tokens stored: an encoder goes on where that changes. Equal for
    equal files, wherever they lie.

    Raises:
        UserError: the model's files are not there.
    """
    return {
        name: int.from_bytes(bytes.fromhex(_fingerprint(_model(name, tower))), "big", signed=True)
        for name, tower in towers.items()
    }


def _model(modality: str, tower: Tower) -> dict[str, Any]:
    return {
        "modality": modality,
        "tiny": TINY_SIZE if tower.model == TINY else None,
        "files": {path.name: _sha256_once(path) for path in model_files(tower)},
        "layers_in_step": tower.layers_in_step,
    }


def _fingerprint(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _sha256_once(path: Path) -> str:
    """Weights are gigabytes, and a run asks what they are several times."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    del size, modified_ns  # tell a file that was written anew from what it was
    return file_sha256(path)


def input_settings(tower: Tower) -> dict[str, Any]:
    """How the tower's inputs are prepared."""
    if isinstance(tower, TextTower):
        return {"max_tokens": tower.max_tokens}
    return {"image_size": tower.image_size, "max_pixels": tower.max_pixels}

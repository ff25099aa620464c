"""The content encoder inside a bundle: what turns text and image of a new item into its vector.

encoder/<modality>/config.json         the whole pretrained model as `save_pretrained` writes it,
encoder/<modality>/model.safetensors   LoRA folded into its top layers: no adapter is left
encoder/<modality>/...                 the files of its tokenizer or image preprocessor
encoder/head.safetensors               fusion and the last linear layer
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from embedding.errors import UserError
from multimodal.content_config import TINY, ContentConfig
from multimodal.content_encoder import load_content_encoder, load_trained_state, merged
from multimodal.tower_files import Tower, input_files, model_identities
from multimodal.towers import UpperTower, whole_model

ENCODER = "encoder"
HEAD_FILE = f"{ENCODER}/head.safetensors"
TOWERS_PREFIX = "towers."
"""Of the encoder's weights that lie in the models' own files."""


def require_trained_models(config: ContentConfig, models_M: Tensor | None) -> None:
    """Refuse tower files that are not those which a training adapted.

    Args:
        config: the recipe's.
        models_M: `bank/models` of its checkpoint, by modality; None where that has none.

    Raises:
        UserError: they differ, or are not there.
    """
    if models_M is None:
        raise UserError(
            "the checkpoint is of a version that does not say on which towers its content encoder "
            "was trained, and LoRA must be folded into no others; delete train/ and catch_up/ of "
            "that date, and run it again"
        )
    now = model_identities(config.towers)
    for (name, identity), trained in zip(now.items(), models_M.tolist(), strict=True):
        if identity != trained:
            raise UserError(
                f"the files of the {name} tower {config.towers[name].model!r} are not those that "
                "the training had: its LoRA would be folded into weights that it was not trained "
                "on; put the files that the training had back, or train again with these: "
                "`braid run` of that date does"
            )


def write_encoder(config: ContentConfig, trained: Mapping[str, Tensor], directory: Path) -> None:
    """Write a trained encoder into a bundle.

    Args:
        config: the recipe's.
        trained: what training changed (`content_encoder.trained_state`).
        directory: of the bundle.

    Raises:
        UserError: the files of a tower are not there, or the weights are of another encoder.
    """
    encoder = load_content_encoder(config)
    load_trained_state(encoder, trained)
    plain = merged(encoder)
    for name, tower in config.towers.items():
        upper = plain.towers[name]
        assert isinstance(upper, UpperTower)
        folder = directory / ENCODER / name
        whole_model(tower, upper).save_pretrained(folder)
        for path in input_files(tower):
            shutil.copyfile(path, folder / path.name)
    head = {
        name: value.contiguous()
        for name, value in plain.state_dict().items()
        if not name.startswith(TOWERS_PREFIX)
    }
    save_file(head, directory / HEAD_FILE)


def model_tower(directory: Path, modality: str, tower: Tower) -> Tower:
    """The tower whose model lies in a bundle."""
    model = str(directory / ENCODER / modality)
    return tower.model_copy(update={"model": model, "revision": None})


def input_tower(directory: Path, modality: str, tower: Tower) -> Tower:
    """The tower that prepares inputs; those of tiny ones are prepared in code, without files."""
    return tower if tower.model == TINY else model_tower(directory, modality, tower)

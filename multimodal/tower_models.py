"""Pretrained models of the towers, loaded; the tiny ones are built here from a fixed seed."""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, ViTConfig
from transformers import logging as transformers_logging

from embedding.errors import UserError
from multimodal.content_config import TextTower
from multimodal.tower_files import TINY_PATCH, TINY_SIZE, TINY_VOCABULARY, Tower, model_directory

_TINY_SEED = 20240406


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
                **TINY_SIZE,
            )
            return AutoModel.from_config(text, dtype=torch.float32).eval()
        if tower.image_size % TINY_PATCH:
            raise UserError(
                f"image_size={tower.image_size} is no multiple of the tiny tower's patches of "
                f"{TINY_PATCH} pixels; use {tower.image_size + -tower.image_size % TINY_PATCH}"
            )
        image = ViTConfig(image_size=tower.image_size, patch_size=TINY_PATCH, **TINY_SIZE)
        return AutoModel.from_config(image, dtype=torch.float32).eval()

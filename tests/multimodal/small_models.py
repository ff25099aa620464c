"""Small random pretrained models on disk, and token batches, for the tests of the towers."""

from pathlib import Path

import torch
from transformers import AutoModel, BertConfig, Dinov2Config

from multimodal.content_config import ContentConfig, ImageTower, Lora, TextTower
from multimodal.token_batch import ModalityTokens, TokenBatch

IMAGE_SIZE = 28


def save_text_model(directory: Path, **changes: object) -> str:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    AutoModel.from_config(BertConfig(**{**sizes, **changes})).save_pretrained(directory)
    return str(directory)


def save_image_model(directory: Path, **changes: object) -> str:
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "initializer_range": 0.2,
    }
    torch.manual_seed(2)
    AutoModel.from_config(Dinov2Config(**{**sizes, **changes})).save_pretrained(directory)
    return str(directory)


def small_config(tmp_path: Path, **changes: object) -> ContentConfig:
    """Both modalities, two trainable layers of three, LoRA in both, float32 tokens."""
    text = TextTower(
        model=save_text_model(tmp_path / "text"),
        max_tokens=6,
        trainable_layers=2,
        lora=Lora(rank=2),
        precision="float32",
    )
    image = ImageTower(
        model=save_image_model(tmp_path / "image"),
        image_size=IMAGE_SIZE,
        trainable_layers=2,
        lora=Lora(rank=2),
        precision="float32",
    )
    return ContentConfig.model_validate({"text": text, "image": image, "dim": 8, **changes})


def tiny_config(**changes: object) -> ContentConfig:
    return ContentConfig.model_validate({"text": {}, "image": {}, "dim": 8, **changes})


def random_tokens(num_items: int, *, seed: int = 0, width: int = 32) -> TokenBatch:
    """Texts of 1 .. 5 tokens and images of 4, of the tiny towers' width."""
    random = torch.Generator().manual_seed(seed)
    lengths_U1 = torch.randint(1, 6, (num_items, 1), generator=random)
    return TokenBatch(
        {
            "text": ModalityTokens(
                torch.randn(num_items, 5, width, generator=random),
                torch.arange(5) < lengths_U1,
            ),
            "image": ModalityTokens(
                torch.randn(num_items, 4, width, generator=random),
                torch.ones(num_items, 4, dtype=torch.bool),
            ),
        }
    )


def without(batch: TokenBatch, modality: str, rows: list[int]) -> TokenBatch:
    """The same batch, whose items at `rows` lack a modality."""
    part = batch.modalities[modality]
    mask_UL = part.mask_UL.clone()
    mask_UL[rows] = False
    return TokenBatch({**batch.modalities, modality: ModalityTokens(part.tokens_ULH, mask_UL)})

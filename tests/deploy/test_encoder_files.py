"""Bundled encoders of pretrained towers need nothing but the bundle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from deploy.encoder_files import ENCODER, require_trained_models, write_encoder
from deploy.item_encoder import ItemEncoder
from embedding.errors import UserError
from multimodal.content_bank import ContentBank
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import ContentEncoder, load_content_encoder, trained_state
from multimodal.item_inputs import build_preparer
from multimodal.item_tokens import LowerEncoder
from multimodal.token_batch import TokenBatch
from multimodal.tower_files import model_identities
from multimodal.towers import load_tower
from tests.multimodal.small_models import IMAGE_SIZE, save_image_model, small_config

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "green", "a", "film"]
TEXTS = ["a red film", None, "blue green blue a red film", "unheard of"]
PICTURES = ["one.png", "two.png", None, "absent.png"]


@pytest.fixture
def models(tmp_path: Path) -> ContentConfig:
    """A text model with its tokenizer, an image model with its preprocessor, on disk."""
    config = small_config(tmp_path / "models")
    text, image = tmp_path / "models" / "text", tmp_path / "models" / "image"
    (text / "vocab.txt").write_text("\n".join(WORDS))
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (text / "pytorch_model.bin").write_bytes(b"the same weights again")
    (text / "model.safetensors.index.json").write_text("{}")
    described = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.1, 0.2, 0.3]}
    (image / "preprocessor_config.json").write_text(json.dumps(described))
    for seed, name in enumerate(PICTURES[:2]):
        pixels = np.random.default_rng(seed).integers(0, 255, (IMAGE_SIZE, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(name))
    return config


def trained_encoder(config: ContentConfig) -> ContentEncoder:
    """All that trains is far from where it started."""
    encoder = load_content_encoder(config)
    torch.manual_seed(4)
    with torch.no_grad():
        for value in trained_state(encoder).values():
            value.add_(torch.randn_like(value), alpha=0.2)
    return encoder.eval()


def unmerged_vectors(config: ContentConfig, encoder: ContentEncoder, root: Path) -> Tensor:
    """With peft's adapters beside the weights, from the original files."""
    tokens = {}
    for (name, tower), values in zip(config.towers.items(), (TEXTS, PICTURES), strict=True):
        prepare = build_preparer(tower, root)
        lower = LowerEncoder(load_tower(tower), prepare, tower, CPU)
        tokens[name] = lower(values).of_all_items()
    with torch.no_grad():
        vectors_ND: Tensor = encoder(TokenBatch(tokens))
    return vectors_ND


def test_a_bundled_encoder_stands_alone_and_gives_the_trained_vectors(
    models: ContentConfig, tmp_path: Path
) -> None:
    encoder = trained_encoder(models)
    expected_ND = unmerged_vectors(models, encoder, tmp_path)
    start_ND = unmerged_vectors(models, load_content_encoder(models).eval(), tmp_path)
    write_encoder(models, trained_state(encoder), tmp_path / "bundle")
    shutil.rmtree(tmp_path / "models")

    bundled = ItemEncoder(tmp_path / "bundle", models, tmp_path)
    found = bundled({"text": TEXTS, "image": PICTURES})

    # LoRA folded into a weight rounds otherwise than beside it.
    torch.testing.assert_close(found.vectors_ND, expected_ND, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(start_ND, expected_ND, atol=1e-2)
    assert found.faults == {
        "text": [None, "missing", None, None],
        "image": [None, None, "missing", "no file"],
    }


def test_weights_lie_in_a_bundle_once(models: ContentConfig, tmp_path: Path) -> None:
    write_encoder(models, trained_state(load_content_encoder(models)), tmp_path / "bundle")
    files = {
        str(path.relative_to(tmp_path / "bundle" / ENCODER))
        for path in (tmp_path / "bundle").rglob("*")
        if path.is_file()
    }
    assert files == {
        "head.safetensors",
        *("text/config.json", "text/model.safetensors"),
        *("text/vocab.txt", "text/tokenizer_config.json"),
        *("image/config.json", "image/model.safetensors", "image/preprocessor_config.json"),
    }


def test_a_merged_tower_equals_the_whole_model_with_adapters(
    models: ContentConfig, tmp_path: Path
) -> None:
    """Read by transformers alone; the other side is the unsplit model in peft."""
    encoder = trained_encoder(models)
    write_encoder(models, trained_state(encoder), tmp_path / "bundle")
    assert models.text
    lora = LoraConfig(
        r=2, lora_alpha=16, target_modules=["query", "value"], layers_to_transform=[1, 2]
    )
    whole = inject_adapter_in_model(lora, AutoModel.from_pretrained(models.text.model)).eval()
    with torch.no_grad():
        for name, value in trained_state(encoder).items():
            if name.startswith("towers.text.layers."):
                number, rest = name.removeprefix("towers.text.layers.").split(".", 1)
                # Layer n of the upper part is layer n + 1 of the whole.
                whole.get_parameter(f"encoder.layer.{int(number) + 1}.{rest}").copy_(value)
    merged = AutoModel.from_pretrained(tmp_path / "bundle" / ENCODER / "text").eval()
    words = torch.tensor([[2, 4, 8, 3], [2, 5, 3, 0]])
    mask = (words > 0).long()

    with torch.no_grad():
        expected, found = (
            model(input_ids=words, attention_mask=mask).last_hidden_state[mask.bool()]
            for model in (whole, merged)
        )

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fq_former", "mean", "concat"])
def test_frozen_towers_and_every_fusion_are_carried(
    models: ContentConfig, tmp_path: Path, kind: str
) -> None:
    """All layers of a tower without LoRA are lower ones."""
    towers = {
        name: tower.model_copy(update={"lora": None}) for name, tower in models.towers.items()
    }
    config = ContentConfig.model_validate({**towers, "dim": 8, "fusion": {"kind": kind}})
    encoder = trained_encoder(config)
    write_encoder(config, trained_state(encoder), tmp_path / "bundle")

    bundled = ItemEncoder(tmp_path / "bundle", config, tmp_path)

    torch.testing.assert_close(
        bundled({"text": TEXTS, "image": PICTURES}).vectors_ND,
        unmerged_vectors(config, encoder, tmp_path),
        atol=1e-5,
        rtol=1e-5,
    )


def test_weights_of_another_encoder_are_refused(models: ContentConfig, tmp_path: Path) -> None:
    trained = trained_state(load_content_encoder(models))
    other = models.model_copy(update={"dim": 16})
    with pytest.raises(UserError, match="content encoder is not this recipe's"):
        write_encoder(other, trained, tmp_path / "bundle")


def test_lora_is_folded_into_no_other_files_than_those_of_the_training(
    models: ContentConfig, tmp_path: Path
) -> None:
    item_ids = torch.arange(3)
    bank = ContentBank(item_ids, 4, CPU, models=model_identities(models.towers).values()).state()
    trained = bank["models"]
    require_trained_models(models, trained)
    save_image_model(tmp_path / "models" / "image", num_attention_heads=3)
    with pytest.raises(UserError, match=r"files of the image tower .* put the files that the"):
        require_trained_models(models, trained)
    save_image_model(tmp_path / "models" / "image")
    require_trained_models(models, trained)
    with pytest.raises(UserError, match="delete train/ and catch_up/ of that date"):
        require_trained_models(models, None)

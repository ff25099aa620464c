"""Pretrained models are split exactly, adapted where asked, and refused with the remedy."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    CamembertConfig,
    CLIPVisionConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
    SiglipVisionConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from embedding.errors import UserError
from multimodal.content_config import ImageTower, Lora, TextTower
from multimodal.tower_files import model_directory, model_identities, tower_fingerprint
from multimodal.towers import load_tower
from tests.multimodal.small_models import IMAGE_SIZE, save_image_model, save_text_model

DINO = Path(__file__).parents[3] / "shared" / "models" / "dinov2-small"


@pytest.mark.parametrize("trainable_layers", [1, 2, 3])
def test_a_split_text_tower_computes_what_the_whole_does(
    tmp_path: Path, trainable_layers: int
) -> None:
    path = save_text_model(tmp_path)
    whole = AutoModel.from_pretrained(path).eval()
    split = load_tower(TextTower(model=path, max_tokens=8, trainable_layers=trainable_layers))
    words = torch.randint(0, 64, (5, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [3], [1], [5], [7]])).long()
    expected = whole(input_ids=words, attention_mask=mask).last_hidden_state
    lower = split.lower({"input_ids": words, "attention_mask": mask}).clone()
    found = split.upper(lower, mask.bool())
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_without_lora_all_layers_are_below_the_split(tmp_path: Path) -> None:
    path = save_image_model(tmp_path)
    split = load_tower(ImageTower(model=path, image_size=IMAGE_SIZE, lora=None))
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = split.lower({"pixel_values": pixels}).clone()
    whole = AutoModel.from_pretrained(path).eval()
    torch.testing.assert_close(tokens, whole(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert split.upper(tokens, torch.ones(3, 5, dtype=torch.bool)) is tokens
    assert not list(split.upper.parameters())


def test_an_architecture_with_layers_at_its_top_is_split_too(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    split = load_tower(ImageTower(model=str(tmp_path), image_size=32))
    pixels = torch.randn(2, 3, 32, 32)
    expected = AutoModel.from_pretrained(tmp_path).eval()(pixels).last_hidden_state
    found = split.upper(split.lower({"pixel_values": pixels}).clone(), torch.ones(2, 5).bool())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [CLIPVisionConfig, SiglipVisionConfig])
def test_towers_of_images_and_texts_are_split_too(tmp_path: Path, kind: type) -> None:
    """CLIP's tokens come without its last norm, which is that of the pooled token."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = kind(**sizes, intermediate_size=24, image_size=32, patch_size=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    split = load_tower(ImageTower(model=str(tmp_path), image_size=32, trainable_layers=2))
    pixels = torch.randn(2, 3, 32, 32)
    expected = AutoModel.from_pretrained(tmp_path).eval()(pixels).last_hidden_state
    tokens = split.lower({"pixel_values": pixels}).clone()
    found = split.upper(tokens, torch.ones(tokens.shape[:2]).bool())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_real_vision_tower_is_split_exactly() -> None:
    if not DINO.is_dir():
        pytest.skip(f"{DINO} is not there")
    tower = ImageTower(model=str(DINO), image_size=56, trainable_layers=2)
    split = load_tower(tower)
    pixels = torch.randn(2, 3, 56, 56)
    expected = AutoModel.from_pretrained(DINO, dtype=torch.float32).eval()(pixels).last_hidden_state
    found = split.upper(split.lower({"pixel_values": pixels}).clone(), torch.ones(2, 17).bool())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64), "keeps its layers in none of"),
        (
            ModernBertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                vocab_size=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            ),
            r"do not run apart from the rest \(.+\)",
        ),
    ],
    ids=["layers_elsewhere", "layers_that_need_more"],
)
def test_an_architecture_that_cannot_be_split_is_refused(
    tmp_path: Path, config: object, why: str
) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{why}.*use a BERT-like text or a ViT-like vision model"):
        load_tower(TextTower(model=str(tmp_path), max_tokens=8))


# --- LoRA ----------------------------------------------------------------------------------------


def test_lora_sits_beside_its_targets_only(tmp_path: Path) -> None:
    lora = Lora(rank=2, target_modules=("attention.output.dense", "intermediate.dense"))
    tower = TextTower(model=save_text_model(tmp_path), max_tokens=8, lora=lora)
    upper = load_tower(tower).upper
    trained = {name for name, p in upper.named_parameters() if p.requires_grad}
    places = {name.partition(".lora_")[0] for name in trained}
    assert places == {"layers.0.attention.output.dense", "layers.0.intermediate.dense"}
    ranks = [m.out_features for n, m in upper.named_modules() if n.endswith("lora_A.default")]
    assert ranks == [2, 2]


def test_lora_changes_nothing_before_training(tmp_path: Path) -> None:
    path = save_text_model(tmp_path)
    tokens = torch.randn(2, 4, 16)
    mask = torch.ones(2, 4, dtype=torch.bool)
    adapted = load_tower(TextTower(model=path, max_tokens=8)).upper
    for module in adapted.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            assert module.out_features == 8 or not module.weight.any()  # A is drawn, B is zero
    whole = AutoModel.from_pretrained(path).eval()
    expected = whole.encoder.layer[-1](tokens)
    torch.testing.assert_close(adapted(tokens, mask), expected, atol=1e-5, rtol=1e-5)


def test_a_target_that_matches_nothing_lists_the_candidates(tmp_path: Path) -> None:
    lora = Lora(target_modules=("q_proj",))
    tower = TextTower(model=save_text_model(tmp_path), max_tokens=8, lora=lora)
    with pytest.raises(UserError, match=r"'q_proj' matches nothing.*attention\.self\.query"):
        load_tower(tower)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TextTower(model="./nowhere"), "no such directory"),
        (TextTower(model="package:no_such_package/model"), "make towers"),
        (TextTower(model="package:multimodal/nowhere"), "has no directory 'nowhere'"),
        (TextTower(model="package:multimodal/"), r"no config\.json"),
        (TextTower(trainable_layers=5), "has 2 layers; lower it"),
        (ImageTower(image_size=30), "use 32"),
    ],
)
def test_a_model_that_is_not_there_says_what_to_do(
    tower: TextTower | ImageTower, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_tower(tower)


def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 16; lower it"):
        load_tower(TextTower(model=save_text_model(tmp_path), max_tokens=17))


@pytest.mark.parametrize("kind", [RobertaConfig, XLMRobertaConfig, CamembertConfig])
def test_positions_that_padding_takes_are_not_read(tmp_path: Path, kind: type) -> None:
    """The first token is at position 2, behind that of the padding: 10 hold 8 tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = kind(**sizes, intermediate_size=24, vocab_size=64, max_position_embeddings=10)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="max_tokens=9, .* reads at most 8; lower it"):
        load_tower(TextTower(model=str(tmp_path), max_tokens=9))

    split = load_tower(TextTower(model=str(tmp_path), max_tokens=8))
    words = torch.arange(8, 24).reshape(2, 8)
    tokens = split.lower({"input_ids": words, "attention_mask": torch.ones_like(words)})
    assert tokens.shape == (2, 8, 16)


def test_image_size_must_fit_the_patches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use 42"):
        load_tower(ImageTower(model=save_image_model(tmp_path), image_size=30))


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    weights = Path(save_text_model(tmp_path)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="files are complete"):
        load_tower(TextTower(model=str(tmp_path), max_tokens=8))


def test_the_fingerprint_follows_what_stored_tokens_depend_on(tmp_path: Path) -> None:
    path = save_text_model(tmp_path / "a")
    tower = TextTower(model=path, max_tokens=8)
    twin = tower.model_copy(update={"model": save_text_model(tmp_path / "b"), "column": "title"})
    same = tower_fingerprint("text", tower)
    assert tower_fingerprint("text", twin) == same
    assert tower_fingerprint("text", tower.model_copy(update={"lora": Lora(rank=3)})) == same
    changes = [
        {"max_tokens": 6},
        {"trainable_layers": 2},
        {"lora": None},
        {"precision": "float32"},
        {"model": save_text_model(tmp_path / "c", vocab_size=65)},
        {"model": "tiny"},
    ]
    others = {tower_fingerprint("text", tower.model_copy(update=change)) for change in changes}
    assert len(others | {same}) == 1 + len(changes)


def test_what_an_encoder_is_fitted_to_is_the_model_and_its_cut_alone(tmp_path: Path) -> None:
    tower = TextTower(model=save_text_model(tmp_path / "a"), max_tokens=8)
    image = ImageTower(model=save_image_model(tmp_path / "i"), image_size=28)
    same = model_identities({"text": tower, "image": image})
    assert [*same] == ["text", "image"]
    prepared_otherwise = {
        "text": tower.model_copy(update={"max_tokens": 6, "precision": "float32"}),
        "image": image.model_copy(update={"image_size": 42, "max_pixels": 9, "column": "poster"}),
    }
    assert model_identities(prepared_otherwise) == same
    others = [
        {"trainable_layers": 2},
        {"lora": None},
        {"model": save_text_model(tmp_path / "c", vocab_size=65)},
        {"model": "tiny"},
    ]
    found = [model_identities({"text": tower.model_copy(update=o)})["text"] for o in others]
    assert len({*found, same["text"]}) == 1 + len(others)


def test_tiny_towers_have_no_files() -> None:
    assert model_directory(TextTower()) is None

"""The split, cached, deduplicated encoder trains like a whole model that sees every occurrence."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from embedding.errors import UserError
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import (
    ContentEncoder,
    load_content_encoder,
    load_trained_state,
    merged,
    trained_state,
)
from multimodal.fusion import FusionQFormer
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.towers import load_tower
from tests.multimodal.small_models import (
    IMAGE_SIZE,
    random_tokens,
    small_config,
    tiny_config,
    without,
)

NUM_ITEMS = 6
FUSIONS: list[dict[str, object]] = [
    {"kind": "fq_former", "modality_embedding": True},
    {"kind": "fq_former", "num_layers": 2, "feed_forward": True},
    {"kind": "fq_former", "dim": 24, "mean_tokens": True},
    {"kind": "mean"},
    {"kind": "concat"},
]


class WholeModel(nn.Module):
    """Both pretrained models in one piece, and an FQ-Former of torch's own attention."""

    def __init__(self, config: ContentConfig, encoder: ContentEncoder) -> None:
        super().__init__()
        assert config.text
        assert config.image
        self.text = self._tower(config.text.model, ["query", "value"])
        self.image = self._tower(config.image.model, ["q_proj", "v_proj"])
        fusion = copy.deepcopy(encoder.fusion)
        assert isinstance(fusion, FusionQFormer)
        self.projections, self.queries_QD = fusion.projections, fusion.queries_QD
        layer = fusion.layers[0]
        self.attention = nn.MultiheadAttention(config.dim, layer.num_heads, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(
                torch.cat([layer.query.weight, layer.key_value.weight])
            )
            self.attention.in_proj_bias.zero_()[: config.dim].copy_(layer.query.bias)
            self.attention.out_proj.load_state_dict(layer.output.state_dict())
            for name, value in trained_state(encoder).items():
                if ".lora_" in name:
                    self._same_place(name).copy_(value)
        self.norm, self.output = layer.norm, copy.deepcopy(encoder.output)

    @staticmethod
    def _tower(path: str, targets: list[str]) -> nn.Module:
        model = AutoModel.from_pretrained(path)
        lora = LoraConfig(r=2, lora_alpha=16, target_modules=targets, layers_to_transform=[1, 2])
        return inject_adapter_in_model(lora, model).eval()

    def _same_place(self, name: str) -> Tensor:
        """Layer n of the upper part is layer n + 1 of the whole."""
        _, modality, _, number, rest = name.split(".", 4)
        return self.get_parameter(f"{modality}.encoder.layer.{int(number) + 1}.{rest}")

    def forward(self, words_BL: Tensor, mask_BL: Tensor, pixels_BCSS: Tensor) -> Tensor:
        words_BLH = self.text(input_ids=words_BL, attention_mask=mask_BL).last_hidden_state
        patches_BLH = self.image(pixels_BCSS).last_hidden_state
        text_BLD = self.projections["text"](_one_scale(words_BLH))
        image_BLD = self.projections["image"](_one_scale(patches_BLH))
        queries_BQD = self.queries_QD.expand(len(words_BL), -1, -1)
        joint_BJD = torch.cat([queries_BQD, image_BLD, text_BLD], dim=1)
        hidden_BJ = torch.zeros(joint_BJD.shape[:2], dtype=torch.bool)
        hidden_BJ[:, -words_BL.shape[1] :] = mask_BL == 0
        attended_BJD, _ = self.attention(joint_BJD, joint_BJD, joint_BJD, hidden_BJ)
        out_BJD = self.norm(joint_BJD + attended_BJD)
        return self.output(out_BJD[:, : len(self.queries_QD)].flatten(1))


def _one_scale(tokens_BLH: Tensor) -> Tensor:
    """Every token with mean 0 and variance 1 (1e-5 added, as layer norms do)."""
    centred_BLH = tokens_BLH - tokens_BLH.mean(-1, keepdim=True)
    return centred_BLH / (centred_BLH.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def ranking_loss(candidate_BD: Tensor, history_BSD: Tensor) -> Tensor:
    """Any loss of candidates and histories; labels alternate."""
    attention_BS = torch.einsum("bd,bsd->bs", candidate_BD, history_BSD).softmax(dim=1)
    interest_BD = torch.einsum("bs,bsd->bd", attention_BS, history_BSD)
    logits_B = (interest_BD * candidate_BD).sum(dim=1)
    return functional.binary_cross_entropy_with_logits(logits_B, torch.arange(len(logits_B)) % 2.0)


def item_inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    words_UL = torch.randint(0, 64, (NUM_ITEMS, 6), generator=random)
    lengths_U1 = torch.tensor([6, 1, 3, 6, 2, 5]).unsqueeze(1)
    pixels = torch.randn(NUM_ITEMS, 3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
    return words_UL, (torch.arange(6) < lengths_U1).long(), pixels


@pytest.fixture
def warm_encoder(tmp_path: Path) -> tuple[ContentConfig, ContentEncoder, TokenBatch]:
    """An encoder some steps into training (LoRA no longer zero) and the stored tokens of items."""
    config = small_config(tmp_path)
    towers = {name: load_tower(tower) for name, tower in config.towers.items()}
    encoder = ContentEncoder(config, {name: split.upper for name, split in towers.items()})
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    words_UL, mask_UL, pixels = item_inputs()
    text_ULH = towers["text"].lower({"input_ids": words_UL, "attention_mask": mask_UL})
    image_ULH = towers["image"].lower({"pixel_values": pixels})
    batch = TokenBatch(
        {
            "text": ModalityTokens(text_ULH.clone(), mask_UL.bool()),
            "image": ModalityTokens(
                image_ULH.clone(), torch.ones(image_ULH.shape[:2], dtype=torch.bool)
            ),
        }
    )
    return config, encoder, batch


# --- one gradient --------------------------------------------------------------------------------


def test_gradients_equal_those_of_a_whole_model_that_sees_every_occurrence(
    warm_encoder: tuple[ContentConfig, ContentEncoder, TokenBatch],
) -> None:
    config, encoder, batch = warm_encoder
    whole = WholeModel(config, encoder)
    candidates_B = torch.tensor([0, 3, 3, 5])
    histories_BS = torch.tensor([[1, 2, 0], [4, 4, 5], [1, 0, 3], [2, 2, 2]])

    vectors_UD = encoder(batch)
    loss = ranking_loss(vectors_UD[candidates_B], vectors_UD[histories_BS])
    loss.backward()

    words_UL, mask_UL, pixels = item_inputs()
    rows = torch.cat([candidates_B, histories_BS.flatten()])
    vectors_BD = whole(words_UL[rows], mask_UL[rows], pixels[rows])
    whole_loss = ranking_loss(vectors_BD[:4], vectors_BD[4:].unflatten(0, (4, 3)))
    whole_loss.backward()

    torch.testing.assert_close(loss, whole_loss, atol=1e-6, rtol=0)
    attention = whole.attention
    query_grad, key_value_grad = attention.in_proj_weight.grad.split([8, 16])
    same_place = {
        "fusion.queries_QD": whole.queries_QD.grad,
        "fusion.projections.text.weight": whole.projections["text"].weight.grad,
        "fusion.projections.image.weight": whole.projections["image"].weight.grad,
        "fusion.layers.0.query.weight": query_grad,
        "fusion.layers.0.key_value.weight": key_value_grad,
        "fusion.layers.0.output.weight": attention.out_proj.weight.grad,
        "fusion.layers.0.norm.weight": whole.norm.weight.grad,
        "output.weight": whole.output.weight.grad,
    }
    lora = [name for name in trained_state(encoder) if ".lora_" in name]
    assert len(lora) == 2 * 2 * 2 * 2  # modalities, layers, query and value, A and B
    same_place |= {name: whole._same_place(name).grad for name in lora}
    for name, expected in same_place.items():
        gradient = encoder.get_parameter(name).grad
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5, msg=name)


def test_a_training_step_moves_what_trains_and_nothing_else(
    warm_encoder: tuple[ContentConfig, ContentEncoder, TokenBatch],
) -> None:
    _, encoder, batch = warm_encoder
    before = copy.deepcopy(dict(encoder.named_parameters()))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    vectors_UD = encoder(batch)
    ranking_loss(vectors_UD[:2], vectors_UD[2:].unflatten(0, (2, 2))).backward()
    optimizer.step()
    trained = {n for n in trained_state(encoder) if n in before}
    moved = {n for n, p in encoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    assert all("lora_" in name for name in trained if name.startswith("towers."))


def test_micro_batches_give_the_same_vectors_and_gradients(tmp_path: Path) -> None:
    whole = load_content_encoder(tiny_config())
    pieces = load_content_encoder(tiny_config(gradient={"micro_batch_items": 3}))
    batch = without(random_tokens(8), "image", [1, 7])
    weights_UD = torch.randn(8, 8)
    for encoder in (whole, pieces):
        (encoder(batch) * weights_UD).sum().backward()
    torch.testing.assert_close(pieces(batch), whole(batch))
    for (name, parameter), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_without_gradient_micro_batches_give_the_same_vectors_piece_by_piece() -> None:
    whole = load_content_encoder(tiny_config())
    pieces = load_content_encoder(tiny_config(gradient={"micro_batch_items": 3}))
    batch = without(random_tokens(8), "image", [1, 7])
    sizes: list[int] = []
    pieces.fusion.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    with torch.no_grad():
        torch.testing.assert_close(pieces(batch), whole(batch))
    assert sizes == [3, 3, 2]


def test_micro_batches_draw_the_dropout_of_backward_again() -> None:
    dropout = {"fusion": {"kind": "fq_former", "dropout": 0.5}}
    encoder = load_content_encoder(tiny_config(**dropout, gradient={"micro_batch_items": 3}))
    batch = random_tokens(8)
    gradients = []
    for is_checkpointed in (True, False):
        encoder.zero_grad()
        torch.manual_seed(0)
        pieces = [encoder._fused(encoder.output.weight, piece) for piece in batch.split(3)]
        if is_checkpointed:
            torch.manual_seed(0)
            pieces = [encoder.fused(batch)]
        encoder.output(torch.cat(pieces)).square().sum().backward()
        gradients.append(encoder.output.weight.grad)
    torch.testing.assert_close(*gradients)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_nothing_behind_a_mask_changes_a_vector_or_a_gradient(fusion: dict[str, object]) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    batch = without(without(random_tokens(5), "image", [0, 2]), "text", [1, 2])
    dirty = TokenBatch(
        {
            name: ModalityTokens(
                part.tokens_ULH.masked_fill(~part.mask_UL.unsqueeze(-1), float("nan")),
                part.mask_UL,
            )
            for name, part in batch.modalities.items()
        }
    )
    results = []
    for tokens in (batch, dirty):
        encoder.zero_grad()
        vectors_UD = encoder(tokens)
        vectors_UD.square().sum().backward()
        gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
        results.append([vectors_UD.detach(), *(g.clone() for g in gradients)])
    for clean, unclean in zip(*results, strict=True):
        assert clean.isfinite().all()
        torch.testing.assert_close(clean, unclean, atol=0, rtol=0)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_padding_does_not_change_a_vector(fusion: dict[str, object]) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    batch = random_tokens(5)
    text = batch.modalities["text"]
    longer = ModalityTokens(
        functional.pad(text.tokens_ULH, (0, 0, 0, 3)), functional.pad(text.mask_UL, (0, 3))
    )
    padded = TokenBatch({**batch.modalities, "text": longer})
    torch.testing.assert_close(encoder(padded), encoder(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_an_absent_image_adds_nothing_whatever_its_size(
    fusion: dict[str, object],
) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    batch = without(random_tokens(4), "image", [0, 1, 2, 3])
    image = batch.modalities["image"]
    nothing = ModalityTokens(image.tokens_ULH[:, :1], image.mask_UL[:, :1])
    text_only = TokenBatch({**batch.modalities, "image": nothing})
    vectors_UD = encoder(batch)
    assert not torch.allclose(vectors_UD, encoder(random_tokens(4)))
    torch.testing.assert_close(encoder(text_only), vectors_UD, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_items_with_neither_have_one_finite_vector(fusion: dict[str, object]) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    batch = without(without(random_tokens(4), "image", [0, 3]), "text", [0, 3])
    vectors_UD = encoder(batch)
    assert vectors_UD.isfinite().all()
    torch.testing.assert_close(vectors_UD[0], vectors_UD[3])


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_no_items_have_no_vectors(fusion: dict[str, object]) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    assert encoder(random_tokens(0)).shape == (0, 8)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda f: "_".join(map(str, f.values())))
def test_the_order_of_modalities_does_not_matter(
    fusion: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_content_encoder(tiny_config(fusion=fusion))
    batch = without(random_tokens(5), "image", [1])
    vectors_UD = encoder(batch)
    swapped = TokenBatch(dict(reversed(batch.modalities.items())))
    torch.testing.assert_close(encoder(swapped), vectors_UD, atol=0, rtol=0)
    if isinstance(encoder.fusion, FusionQFormer):
        projections = encoder.fusion.projections
        encoder.fusion.projections = nn.ModuleDict(dict(reversed(projections.items())))
        torch.testing.assert_close(encoder(batch), vectors_UD, atol=1e-6, rtol=1e-5)


# --- what trains, what is kept -------------------------------------------------------------------


def test_frozen_content_trains_its_last_layer_only() -> None:
    towers = {name: {"lora": None} for name in ("text", "image")}
    encoder = load_content_encoder(tiny_config(**towers, fusion={"kind": "concat"}, frozen=True))
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"output.weight", "output.bias"}
    moments = {"output.mean_H", "output.deviation_H"}
    assert set(trained_state(encoder)) == trained | moments


def test_merged_lora_gives_the_same_vectors_without_adapters(
    warm_encoder: tuple[ContentConfig, ContentEncoder, TokenBatch],
) -> None:
    _, encoder, batch = warm_encoder
    plain = merged(encoder)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(plain(batch), encoder(batch), atol=1e-5, rtol=1e-5)
    unadapted = load_tower_vectors(encoder, batch)
    assert not torch.allclose(plain(batch), unadapted, atol=1e-3)


def load_tower_vectors(encoder: ContentEncoder, batch: TokenBatch) -> Tensor:
    """Vectors as if LoRA were zero."""
    plain = copy.deepcopy(encoder)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return plain(batch)


def test_trained_state_restores_an_encoder(
    warm_encoder: tuple[ContentConfig, ContentEncoder, TokenBatch],
) -> None:
    config, encoder, batch = warm_encoder
    fresh = load_content_encoder(config)
    assert not torch.allclose(fresh(batch), encoder(batch))
    load_trained_state(fresh, trained_state(encoder))
    torch.testing.assert_close(fresh(batch), encoder(batch), atol=0, rtol=0)


def test_state_of_another_encoder_is_refused() -> None:
    encoder = load_content_encoder(tiny_config())
    other = load_content_encoder(tiny_config(fusion={"kind": "mean"}))
    with pytest.raises(UserError, match=r"fusion\.absent_D"):
        load_trained_state(encoder, trained_state(other))


def test_building_twice_gives_equal_weights_and_leaves_the_global_seed_alone() -> None:
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one, two = load_content_encoder(tiny_config()), load_content_encoder(tiny_config())
    assert torch.equal(torch.rand(1), first)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)


def test_lora_dropout_acts_in_training_and_the_pretrained_one_never() -> None:
    batch = random_tokens(3)
    encoder = load_content_encoder(tiny_config(text={"lora": {"dropout": 0.5}}))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    encoder.train()
    assert not torch.equal(encoder(batch), encoder(batch))
    towers = encoder.towers.named_modules()
    assert not [m for n, m in towers if m.training and n.endswith(".dropout")]
    encoder.eval()
    assert torch.equal(encoder(batch), encoder(batch))


def test_tokens_of_another_model_are_refused() -> None:
    encoder = load_content_encoder(tiny_config())
    with pytest.raises(UserError, match=r"48 columns.*hidden size 32.*content stage"):
        encoder(random_tokens(2, width=48))

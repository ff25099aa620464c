"""What content takes over from the run before."""

import copy

import pytest
import torch

from embedding.items import ItemRows
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import load_content_encoder
from multimodal.content_learner import ContentLearner
from multimodal.content_source import TrainedContent
from multimodal.fusion import mean_token
from multimodal.token_batch import TokenBatch
from tests.multimodal.small_models import tiny_config, without
from tests.multimodal.test_content_source import (
    CPU,
    NUM_ITEMS,
    NUM_SAMPLES,
    TOKENS,
    _batches,
    _config,
    _content,
    _loss,
    _rows_of,
    _source,
    _whole,
)


def test_a_warm_start_keeps_the_bank_only_for_the_same_texts_and_images() -> None:
    config = _config("targets")
    yesterday, _ = _content(config, tokens=1)
    start = yesterday.head.layer.weight.clone()
    for batch, weights in _batches(2):
        given = yesterday.train(batch)
        _loss(given.vectors_UD[batch.candidate_B], weights[:NUM_SAMPLES]).backward()
        yesterday.learn(1.0)
    content_head = copy.deepcopy(yesterday.head.layer)
    assert not content_head.weight.equal(start)
    yesterday.refresh()
    yesterday.bank.fused_RH[3] = 7.0  # not what the encoder gives
    saved = {name: value.clone() for name, value in yesterday.tensors().items()}
    items = ItemRows.of(torch.arange(NUM_ITEMS), {})
    anew = {"bank": "encoded anew with the weights that were carried"}
    for tokens, reason in ((1, {}), (2, anew)):
        today, learner = _content(config, tokens=tokens)
        assert today.warm_start(saved) == reason
        today.refresh()
        with torch.no_grad():
            expected = learner.encoder.eval().fused(TOKENS)[3]
            if tokens == 1:
                expected = torch.full_like(expected, 7.0)
            expected = content_head(expected.unsqueeze(0))[0]
        torch.testing.assert_close(today.read(items).vectors_UD[1 + 3], expected)


class _Asked(dict[str, torch.Tensor]):
    """Tensors of a checkpoint, and which were asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.add(name)
        return super().__getitem__(name)


def test_a_bank_of_other_texts_and_images_is_not_read() -> None:
    config = _config("targets")
    yesterday, _ = _content(config, tokens=1)
    yesterday.refresh()
    saved = {name: value.clone() for name, value in yesterday.tensors().items()}
    for tokens, is_read in ((1, True), (2, False)):
        today, _ = _content(config, tokens=tokens)
        asked = _Asked(saved)
        assert ("bank" in today.warm_start(asked)) is not is_read
        assert ("bank/fused" in asked.names) is is_read


def test_a_warm_start_takes_nothing_of_an_encoder_of_other_towers() -> None:
    config = _config("targets")
    yesterday, _ = _content(config, models=(1, 2))
    batch, weights = next(_batches(1))
    given = yesterday.train(batch)
    _loss(given.vectors_UD[batch.candidate_B], weights[:NUM_SAMPLES]).backward()
    yesterday.learn(1.0)
    yesterday.head.layer.mean_H.fill_(5.0)
    saved = {name: value.clone() for name, value in yesterday.tensors().items()}
    today, other = _content(config, models=(1, 3))
    start = copy.deepcopy(_whole(today, other).state_dict())

    assert today.warm_start(saved) == {
        "encoder": "was trained on other towers (other files of a model, or cut at another layer)",
        "bank": "encoded anew",
    }
    found = _whole(today, other).state_dict()
    assert all(value.equal(start[name]) for name, value in found.items())
    same, learner = _content(config, models=(1, 2))
    assert "encoder" not in same.warm_start(saved)
    assert _whole(same, learner).output.mean_H.eq(5.0).all()


def _source_of(
    config: ContentConfig, stored: TokenBatch, **identity: int
) -> tuple[TrainedContent, ContentLearner]:
    """Content of these items, standardised as a training begins."""

    def read(rows_U: torch.Tensor) -> TokenBatch:
        return _rows_of(stored, rows_U)

    learner = ContentLearner(config, load_content_encoder(config), read, CPU)
    learner.standardise(learner.moments(torch.arange(NUM_ITEMS)))
    return _source(config, learner, **identity), learner


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_modality_that_comes_later_is_standardised_when_it_comes(is_frozen: bool) -> None:
    towers = {"text": {"lora": None}, "image": {"lora": None}} if is_frozen else {}
    config = tiny_config(fusion={"kind": "concat"}, cic=None, frozen=is_frozen, **towers)
    no_images = without(TOKENS, "image", [*range(NUM_ITEMS)])
    lacking = [2, 5]
    today_tokens = without(TOKENS, "image", lacking)
    yesterday, _ = _source_of(config, no_images, tokens=1)
    for batch, weights in _batches(2):
        given = yesterday.train(batch)
        _loss(given.vectors_UD[batch.candidate_B], weights[:NUM_SAMPLES]).backward()
        yesterday.learn(1.0)
    yesterday.refresh()
    items = ItemRows.of(torch.arange(NUM_ITEMS), {})
    before = yesterday.read(items).vectors_UD
    saved = {name: value.clone() for name, value in yesterday.tensors().items()}

    today, learner = _source_of(config, today_tokens, tokens=2)
    kept = today.warm_start(saved)

    assert "32 of 64 columns were constant" in kept["encoder/output.deviation_H"]
    # By definition, of the items that have an image.
    means = mean_token(TOKENS.modalities["image"])
    if not is_frozen:
        means = learner.encoder._upper("image", TOKENS.modalities["image"])
        means = mean_token(means).detach()
    has = torch.tensor([i not in lacking for i in range(NUM_ITEMS)])
    expected = torch.zeros(NUM_ITEMS, 32)
    expected[has] = (means[has] - means[has].mean(0)) / means[has].std(0, correction=0)
    encoder = _whole(today, learner)
    with torch.no_grad():
        parts = encoder.output.standardised(encoder.fused(today_tokens)).split(32, dim=1)
    names = [*encoder.fusion.absent_H]
    found = parts[names.index("image")]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert learner.encoder.output.deviation_H.equal(today.head.layer.deviation_H)
    # What had no image before and has none now keeps its vector.
    today.refresh()
    after = today.read(items).vectors_UD
    for item in lacking:
        torch.testing.assert_close(after[1 + item], before[1 + item], rtol=1e-5, atol=1e-5)

    resumed, _ = _source_of(config, today_tokens, tokens=1)
    resumed.load(saved)
    assert resumed.head.layer.deviation_H.isinf().sum() == 32

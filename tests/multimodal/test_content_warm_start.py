"""What content takes over from the run before."""

import copy

import torch

from embedding.items import ItemRows
from tests.multimodal.test_content_source import (
    NUM_ITEMS,
    NUM_SAMPLES,
    TOKENS,
    _batches,
    _config,
    _content,
    _loss,
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

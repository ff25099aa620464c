"""Content in training steps against an encoder that sees every occurrence, without any bank."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embedding.items import ItemHistory, ItemRows
from embedding.precision import cpu_has_bf16
from multimodal.content_bank import ContentBank
from multimodal.content_config import ContentConfig, Gradient, Service
from multimodal.content_encoder import (
    ContentEncoder,
    load_content_encoder,
    load_trained_state,
    trained_state,
)
from multimodal.content_head import ContentHead
from multimodal.content_learner import ContentLearner
from multimodal.content_source import TrainedContent
from multimodal.gradient_items import own_rows
from multimodal.inline_encoder import InlineEncoder
from multimodal.rank_group import RankGroup
from multimodal.token_batch import ModalityTokens, TokenBatch
from tests.multimodal.small_models import random_tokens, tiny_config, without

CPU = torch.device("cpu")
NUM_ITEMS, DIM, NUM_SAMPLES = 12, 8, 5
TOKENS = random_tokens(NUM_ITEMS)


def _rows_of(tokens: TokenBatch, rows_U: Tensor) -> TokenBatch:
    return TokenBatch(
        {
            name: ModalityTokens(part.tokens_ULH[rows_U], part.mask_UL[rows_U])
            for name, part in tokens.modalities.items()
        }
    )


def read_tokens(rows_U: Tensor) -> TokenBatch:
    return _rows_of(TOKENS, rows_U)


def _content(
    config: ContentConfig, device: torch.device = CPU, **identity: Any
) -> tuple[TrainedContent, ContentLearner]:
    learner = ContentLearner(config, load_content_encoder(config), read_tokens, device)
    return _source(config, learner, **identity), learner


def _source(config: ContentConfig, learner: ContentLearner, **identity: Any) -> TrainedContent:
    ranks, placement = RankGroup(), InlineEncoder(learner, RankGroup())
    head = ContentHead(placement.head(), config, ranks, learner.device)
    item_ids = torch.arange(NUM_ITEMS) * 10
    bank = ContentBank(item_ids, head.width, learner.device, **identity)
    return TrainedContent(config, placement, head=head, bank=bank, ranks=ranks)


def _whole(content: TrainedContent, learner: ContentLearner) -> ContentEncoder:
    """A copy of the encoder as it is now, with its last layer."""
    encoder = copy.deepcopy(learner.encoder)
    encoder.output.load_state_dict(content.head.layer.state_dict())
    return encoder.eval()


def _gradient(content: TrainedContent, learner: ContentLearner, name: str) -> Tensor | None:
    inner = name.removeprefix("output.")
    module = learner.encoder if inner == name else content.head.layer
    return module.get_parameter(inner).grad


def _config(items: str, **changes: object) -> ContentConfig:
    settings = {"max_items_per_step": None, **changes}
    return tiny_config(gradient={"items": items, **settings}, cic=None)


def _batches(num_steps: int, num_items: int = NUM_ITEMS) -> Iterator[tuple[ItemRows, Tensor]]:
    """Items of a step, and a weight for every read vector: candidates first, then events."""
    random = torch.Generator().manual_seed(5)
    for _ in range(num_steps):
        candidates = torch.randint(-1, num_items, (NUM_SAMPLES,), generator=random)
        lengths = torch.randint(0, 4, (NUM_SAMPLES,), generator=random)
        events = torch.randint(-1, num_items, (int(lengths.sum()),), generator=random)
        items = ItemRows.of(candidates, {"past": (events, lengths)})
        weights = torch.randn(NUM_SAMPLES + len(events), DIM, generator=random)
        yield items, weights


def _read_rows(items: ItemRows) -> Tensor:
    """Store rows of all occurrences."""
    history: ItemHistory = items.histories["past"]
    return items.rows_U[torch.cat([items.candidate_B, history.items_N])]


def _loss(vectors: Tensor, weights: Tensor) -> Tensor:
    return (weights * vectors).square().sum()


class Plain:
    """The same encoder, run for every occurrence in the step's graph."""

    def __init__(self, config: ContentConfig) -> None:
        self.encoder: ContentEncoder = load_content_encoder(config)
        rates = config.optimizer
        lora, head, rest = rates.lora_learning_rate, rates.head_learning_rate, rates.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": p, "lr": lora if "lora_" in n else head if "output." in n[:7] else rest}
                for n, p in self.encoder.named_parameters()
                if p.requires_grad
            ],
            weight_decay=rates.weight_decay,
        )

    def vectors(self, rows: Tensor) -> Tensor:
        found = self.encoder(read_tokens(rows.clamp(min=0)))
        return torch.where(rows.unsqueeze(1) >= 0, found, 0.0)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_deduplicated_training_equals_encoding_every_occurrence(micro_batch: int | None) -> None:
    config = _config("all", micro_batch_items=micro_batch)
    config = config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(
                update={
                    "lora_learning_rate": 4e-3,
                    "head_learning_rate": 2e-3,
                    "weight_decay": 0.01,
                }
            )
        }
    )
    content, learner = _content(config)
    plain = Plain(config)
    start = {name: value.clone() for name, value in learner.encoder.state_dict().items()}
    for items, weights in _batches(6):
        given = content.train(items)
        assert not given.vectors_UD[0].any()
        history = items.histories["past"]
        ours = _loss(given.vectors_UD[torch.cat([items.candidate_B, history.items_N])], weights)
        ours.backward()
        content.learn(1.0)
        theirs = _loss(plain.vectors(_read_rows(items)), weights)
        plain.step(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for name, parameter in plain.encoder.named_parameters():
            if parameter.grad is not None:
                found = _gradient(content, learner, name)
                torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)
    trained = trained_state(plain.encoder)
    for name, value in _whole(content, learner).state_dict().items():
        if name in trained:
            torch.testing.assert_close(value, trained[name], rtol=1e-5, atol=1e-5)
        else:
            assert value.equal(start[name])
    metrics = content.metrics()
    assert all(metrics[f"content/gradient_norm_{p}"] > 0 for p in ("tower", "fusion", "heads"))


def test_of_a_frozen_encoder_every_item_is_read_once_and_all_items_train_its_last_layer() -> None:
    frozen = {"text": {"lora": None}, "image": {"lora": None}, "frozen": True}
    config = ContentConfig.model_validate(
        {**frozen, "dim": DIM, "fusion": {"kind": "concat"}, "cic": None}
    )
    tokens = without(TOKENS, "text", rows=[2, 5])
    read: list[int] = []

    def counted(rows_U: Tensor) -> TokenBatch:
        read.extend(rows_U.tolist())
        return _rows_of(tokens, rows_U)

    encoder, plain = load_content_encoder(config), load_content_encoder(config)
    learner = ContentLearner(config, encoder, counted, CPU)
    moments = learner.moments(torch.arange(NUM_ITEMS))
    learner.standardise(moments)
    plain.standardise(moments)
    content = _source(config, learner)
    read.clear()
    optimizer = torch.optim.AdamW(
        plain.output.parameters(), lr=config.optimizer.head_learning_rate, weight_decay=0.0
    )
    for items, weights in _batches(4):
        rows = _read_rows(items)
        expected = plain(_rows_of(tokens, rows.clamp(min=0)))
        expected = torch.where(rows.unsqueeze(1) >= 0, expected, 0.0)
        places = torch.cat([items.candidate_B, items.histories["past"].items_N])
        found = content.train(items).vectors_UD[places]
        torch.testing.assert_close(found, expected)
        _loss(found, weights).backward()
        content.learn(1.0)
        optimizer.zero_grad()
        _loss(expected, weights).backward()
        optimizer.step()
    torch.testing.assert_close(content.head.layer.weight, plain.output.weight)
    assert "content/bank_age_steps" not in content.metrics()  # it is never behind
    content.refresh()
    every = ItemRows.of(torch.arange(NUM_ITEMS), {})
    torch.testing.assert_close(content.read(every).vectors_UD[1:], plain(tokens).detach())
    assert sorted(read) == list(range(NUM_ITEMS))

    # Another catalogue's mean stands for what an item lacks.
    saved = {name: value.clone() for name, value in content.tensors().items()}
    saved["encoder/output.mean_H"] += 1.0
    assert "bank" in _source(config, learner, tokens=1).warm_start(saved)
    load_trained_state(
        plain, {n.removeprefix("encoder/"): t for n, t in saved.items() if n.startswith("encoder/")}
    )
    expected = plain.fused(tokens).detach()
    torch.testing.assert_close(learner.encode(torch.arange(NUM_ITEMS)), expected)


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16 products")
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_bf16_steps_follow_fp32_ones_and_published_vectors_are_fp32(
    micro_batch: int | None,
) -> None:
    gradient = {"micro_batch_items": micro_batch}
    whole, whole_learner = _content(_config("all", **gradient))
    config = whole.config.model_copy(update={"precision": "bf16"})
    reduced, learner = _content(config)
    items, weights = next(_batches(1))
    read = torch.cat([items.candidate_B, items.histories["past"].items_N])
    start = whole.head.layer.weight.clone()
    vectors = []
    for content in (whole, reduced):
        given = content.train(items).vectors_UD
        vectors.append(given.detach())
        (weights * given[read]).sum().backward()
        content.learn(0.0)
    assert whole.head.layer.weight.equal(start)  # rates times 0
    assert vectors[1].dtype == torch.float32
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0.05, atol=0.02)
    assert not vectors[1].equal(vectors[0])
    for name, parameter in whole_learner.encoder.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 0:
            found = _gradient(reduced, learner, name)
            assert found is not None
            assert found.dtype == torch.float32
            assert torch.cosine_similarity(found.flatten(), parameter.grad.flatten(), 0) > 0.99
    every = ItemRows.of(torch.arange(NUM_ITEMS), {})
    with torch.no_grad():
        expected = _whole(reduced, learner)(TOKENS)
    in_training = reduced.read(every).vectors_UD[1:]  # of step 0, whose rates were 0
    torch.testing.assert_close(in_training, expected, rtol=0.05, atol=0.02)
    assert not torch.allclose(in_training, expected)
    reduced.refresh()
    torch.testing.assert_close(reduced.read(every).vectors_UD[1:], expected)


@pytest.mark.parametrize("every", [None, 2])
def test_history_items_are_read_as_of_their_last_encoding(every: int | None) -> None:
    content, learner = _content(_config("targets", refresh_every_steps=every))
    encoders: list[ContentEncoder] = [copy.deepcopy(learner.encoder)]
    last = torch.zeros(NUM_ITEMS, dtype=torch.int64)  # step of the last encoding
    ages, cosines = [], []
    for step, (items, weights) in enumerate(_batches(5)):
        if every is not None and step % every == 0:
            last.fill_(step)
        candidates = items.rows_U[items.candidate_B]
        encoded = candidates[candidates >= 0].unique()
        with torch.no_grad():
            for row in encoded.tolist():
                before, now = (
                    content.head.vectors(encoders[number].fused(read_tokens(torch.tensor([row]))))[
                        0
                    ]
                    for number in (last[row], step)
                )
                cosines.append(float(before @ now / (before.norm() * now.norm())))
        last[encoded] = step
        given = content.train(items)
        for place, row in enumerate(items.rows_U.tolist()[1:], start=1):
            with torch.no_grad():
                fused = encoders[last[row]].fused(read_tokens(torch.tensor([row])))
                expected = content.head.vectors(fused)[0]  # the last layer is never behind
            torch.testing.assert_close(given.vectors_UD[place].detach(), expected)
            ages.append(step - int(last[row]))
        read = torch.cat([items.candidate_B, items.histories["past"].items_N])
        _loss(given.vectors_UD[read], weights).backward()
        content.learn(1.0)
        encoders.append(copy.deepcopy(learner.encoder))
    metrics = content.metrics()
    assert metrics["content/bank_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert metrics["content/bank_age_steps"] == pytest.approx(sum(ages) / len(ages))
    assert metrics["content/distinct_items_per_rank"] == pytest.approx(len(ages) / 5)
    assert content.metrics()["content/encoded_items"] == 0


def test_evaluation_reads_every_item_with_the_present_weights() -> None:
    content, learner = _content(_config("targets"))
    for items, weights in _batches(3, num_items=4):
        given = content.train(items)
        _loss(given.vectors_UD[items.candidate_B], weights[:NUM_SAMPLES]).backward()
        content.learn(1.0)
    content.refresh()
    items = ItemRows.of(torch.arange(-1, NUM_ITEMS), {})
    with torch.no_grad():
        expected = _whole(content, learner)(TOKENS)
    found = content.read(items).vectors_UD
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.cat([torch.zeros(1, DIM), expected]))


def test_a_restored_run_goes_on_as_if_it_had_not_stopped() -> None:
    config = _config("targets+sample", sample_share=0.5, max_items_per_step=4)
    content, learner = _content(config)
    other, other_learner = _content(config)
    for step, (items, weights) in enumerate(_batches(8)):
        if step == 4:
            saved = {
                name: t.detach().reshape(t.shape or (1,)).clone()
                for name, t in content.tensors().items()
            }
            other.load(saved)
        for each in (content, other)[: 1 if step < 4 else 2]:
            given = each.train(items)
            read = torch.cat([items.candidate_B, items.histories["past"].items_N])
            _loss(given.vectors_UD[read], weights).backward()
            each.learn(0.5)
    found = _whole(other, other_learner).state_dict()
    for name, value in _whole(content, learner).state_dict().items():
        assert value.equal(found[name])
    assert content.bank.fused_RH.equal(other.bank.fused_RH)


def _bank_after_announced_steps(device: torch.device) -> Tensor:
    """Vectors after steps that learn of the next batch as the loader gives it, on the CPU."""
    config = _config("all").model_copy(update={"placement": Service(staleness=1)})
    content, _ = _content(config, device)
    batches: Iterator[Any] = iter([SimpleNamespace(content=items) for items, _ in _batches(4)])
    for batch in content.ahead(batches):
        content.train(batch.content.to(device)).vectors_UD.square().sum().backward()
        content.learn(1.0)
    return content.bank.fused_RH.cpu()


@pytest.mark.gpu
def test_batches_announced_from_the_cpu_are_encoded_on_the_gpu() -> None:
    found = _bank_after_announced_steps(torch.device("cuda"))
    torch.testing.assert_close(found, _bank_after_announced_steps(CPU), rtol=1e-3, atol=1e-4)


def _chosen(batch: ItemRows, seed: int = 0, /, **policy: object) -> set[int]:
    random = torch.Generator().manual_seed(seed)
    found = own_rows(batch, Gradient.model_validate(policy), random)
    assert found.equal(torch.unique(found))
    return set(found.tolist())


def _shown_and_remembered(candidates: Tensor, events: Tensor) -> ItemRows:
    """Every sample's item, and one history that holds the candidates, too."""
    past = torch.cat([events, candidates])
    return ItemRows.of(candidates, {"past": (past, torch.tensor([len(past)]))})


def test_policies_choose_candidates_and_history_items() -> None:
    items = _shown_and_remembered(torch.tensor([3, 3, 9, -1, 11]), torch.arange(20, 60))
    own, others = {3, 9, 11}, set(range(20, 60))

    assert _chosen(items, items="targets") == own
    assert _chosen(items, items="all") == own | others
    sampled = _chosen(items, items="targets+sample", sample_share=0.25)
    assert own < sampled < own | others
    assert len(sampled) == len(own) + 10
    assert _chosen(items, 1, items="targets+sample", sample_share=0.25) != sampled


def test_the_bound_is_shared_by_candidates_and_history_items() -> None:
    few = _shown_and_remembered(torch.tensor([3, 9, 11]), torch.arange(20, 60))
    many = _shown_and_remembered(torch.arange(20), torch.arange(20, 60))
    alone = _shown_and_remembered(torch.arange(20), torch.arange(0))

    def counts(items: ItemRows, **policy: object) -> tuple[int, int]:
        """Candidates and history items of what is chosen."""
        chosen = _chosen(items, items="targets+sample", sample_share=0.2, **policy)
        return len([row for row in chosen if row < 20]), len([row for row in chosen if row >= 20])

    assert counts(many, max_items_per_step=None) == (20, 8)
    assert counts(many, max_items_per_step=28) == (20, 8)
    assert counts(many, max_items_per_step=12) == (9, 3)
    assert counts(many, max_items_per_step=12, history_share=0.5) == (6, 6)
    assert counts(many, max_items_per_step=12, history_share=0) == (12, 0)
    assert counts(many, max_items_per_step=1, history_share=0.9) == (1, 0)
    # What one side leaves, the other takes.
    assert counts(few, max_items_per_step=8) == (3, 5)
    assert counts(few, max_items_per_step=100) == (3, 8)
    assert counts(alone, max_items_per_step=12) == (12, 0)
    assert len(_chosen(many, items="all", max_items_per_step=40)) == 40
    assert len(_chosen(many, items="targets", max_items_per_step=12)) == 12


def test_under_the_bound_all_items_of_a_kind_are_equally_likely() -> None:
    items = _shown_and_remembered(torch.arange(10), torch.arange(10, 30))
    policy = {"items": "targets+sample", "sample_share": 0.5, "max_items_per_step": 8}
    num_draws = 4000
    times = torch.zeros(30)
    for seed in range(num_draws):
        times[list(_chosen(items, seed, **policy))] += 1
    # Six of ten candidates, two of twenty history items.
    expected = torch.tensor([0.6] * 10 + [0.1] * 20) * num_draws
    # Five standard deviations of a binomial: thirty of them stay within with probability 0.99998.
    allowed = 5 * (expected * (1 - expected / num_draws)).sqrt()
    assert ((times - expected).abs() < allowed).all(), times


def test_what_is_drawn_depends_on_seed_step_and_rank_alone() -> None:
    class Ranks(RankGroup):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank = rank

    items = _shown_and_remembered(torch.arange(8), torch.arange(8, 12))
    policy = {"items": "targets+sample", "sample_share": 1.0, "max_items_per_step": 6}

    def requested(seed: int = 0, step: int = 0, rank: int = 0) -> list[int]:
        config = _config(**policy).model_copy(update={"seed": seed})
        content, _ = _content(config)
        content.step, content._ranks = step, Ranks(rank)
        content.train(items)
        assert content._current is not None
        rows_G = content._current.rows_G
        assert rows_G is not None
        found: list[int] = rows_G.tolist()
        return found

    assert requested() == requested()
    different = [requested(), requested(seed=1), requested(step=1), requested(rank=1)]
    assert len({tuple(rows) for rows in different}) == len(different)

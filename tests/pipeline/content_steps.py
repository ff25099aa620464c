"""Training steps on content with given placements, on the ranks of any process group."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from embedding.arrow import Rows, concat_rows
from embedding.batch import RankingBatch
from embedding.epochs import EpochPlan
from embedding.errors import UserError
from embedding.loader import SampleFiles
from embedding.shard import Sharded
from multimodal.stored_content import Places, StoredContent, StoredModality, write_index
from multimodal.token_store import PartTokens, TokenStore
from multimodal.tower_files import tower_fingerprint
from pipeline.config import Recipe
from pipeline.content.paths import ContentPaths
from pipeline.content.training import RankContent, rank_content
from pipeline.planning_worker import plan_recipe
from pipeline.train import TrainJob
from pipeline.training_worker import build, train_worker
from ranking.losses import TaskLoss
from ranking.steps import PlainSteps
from tests.embedding.toy import gather_tables
from tests.multimodal.small_models import random_tokens

NUM_STEPS, GLOBAL_BATCH, NUM_ITEMS = 20, 32, 30
CPU = torch.device("cpu")


def recipe(**content: Any) -> Recipe:
    """Tiny towers; nothing random in a step, so that parts of a batch add up to the whole."""
    return Recipe.model_validate(
        {
            "name": "steps",
            "data": {"root": "unused"},
            "features": {
                "tables": [
                    {"name": "user", "num_embeddings": 20, "embedding_dim": 8},
                    {"name": "item", "num_embeddings": 40, "embedding_dim": 8},
                ],
                "sparse": [
                    {"name": "user_id", "table": "user"},
                    {"name": "item_id", "table": "item"},
                ],
                "histories": [{"name": "past"}],
                "sequences": [
                    {
                        "name": "past_item",
                        "history": "past",
                        "table": "item",
                        "column": "item_id",
                        "target": "item_id",
                    }
                ],
            },
            "content": {
                "text": {"lora": {"rank": 2}},
                "image": {"lora": {"rank": 2}},
                "dim": 8,
                "cic": None,
                "gradient": {"items": "all", "max_items_per_step": None},
                **content,
            },
            "embedding": {"optimizer": {"kind": "sgd", "learning_rate": 0.1}},
            "ranking": {
                "tasks": [{"name": "click"}],
                "model": {"classifier": {"kind": "dnn", "hidden": [16], "dropout": 0.0}},
            },
            "gate": {"task": "click"},
        }
    )


def write_inputs(folder: Path, **content: Any) -> None:
    """Samples of `NUM_STEPS` global batches, and the stored tokens of the items."""
    write_samples(folder / "samples.parquet")
    write_tokens(folder, **content)


def write_samples(path: Path) -> None:
    """`NUM_STEPS` global batches; some show or remember items that there are not."""
    rng = np.random.default_rng(0)
    num_rows = NUM_STEPS * GLOBAL_BATCH
    users, items = rng.integers(20, size=num_rows), rng.integers(-1, NUM_ITEMS, num_rows)
    past = [rng.integers(0, NUM_ITEMS + 2, rng.integers(0, 6)).tolist() for _ in range(num_rows)]
    ids = {"request_id": np.arange(num_rows), "user_id": users, "item_id": items}
    table = pa.table(
        {
            **{f"key:{name}": values for name, values in ids.items()},
            "key:timestamp": np.arange(num_rows),
            "label:click": ((users + items) % 3 == 0).astype(np.float32),
            "sparse:user_id": users,
            "sparse:item_id": items,
            "sequence:past_item": pa.array(past, pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, path)


def write_tokens(folder: Path, **settings: Any) -> None:
    """Random tokens of the items, as if the towers of `recipe` had made them, and their index."""
    tokens = random_tokens(NUM_ITEMS)
    content = recipe(**settings).content
    assert content is not None
    modalities, places = {}, {}
    for name, part in tokens.modalities.items():
        identity = tower_fingerprint(name, content.towers[name])
        store = TokenStore(folder / "stores" / name, identity, "float32")
        lengths = part.mask_UL.sum(dim=1)
        item_ids = np.arange(NUM_ITEMS)
        written = store.append(
            PartTokens(
                item_ids,
                item_ids,
                [None] * NUM_ITEMS,
                part.tokens_ULH,
                lengths,
                [False] * NUM_ITEMS,
            )
        )
        modalities[name] = StoredModality(
            store=name,
            fingerprint=identity,
            precision="float32",
            hidden_size=part.tokens_ULH.shape[2],
            parts=(written,),
        )
        places[name] = Places(np.zeros(NUM_ITEMS, np.int64), item_ids, lengths.numpy())
    (folder / "index").mkdir()
    stored = StoredContent(num_items=NUM_ITEMS, modalities=modalities)
    write_index(folder / "index", np.arange(NUM_ITEMS), stored, places)


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined] # public, but not in __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_cases_of_job(config: dict[str, str]) -> None:
    """`train_cases` as a Ray Train worker."""
    train_cases(json.loads(config["job"]))


def train_cases(config: dict[str, str]) -> None:
    """Train every case on all ranks; rank 0 writes `<case>.pt`."""
    torch.set_num_threads(1)
    folder = Path(config["folder"])
    for name, content in json.loads(config["cases"]).items():
        found = _train(recipe(**content), folder)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


def failed_training(job: str) -> tuple[str, list[str]]:
    """What a training raised, and the actors that are left while the process keeps the error."""
    with one_process(), pytest.raises(UserError) as kept:
        train_worker(TrainJob.model_validate_json(job))
    return str(kept.value), actors_left()


def actors_left() -> list[str]:
    """Named actors that do not end in a moment."""
    deadline = time.monotonic() + 10
    while (names := ray.util.list_named_actors()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [str(name) for name in names]


def build_rank(settings: Recipe, folder: Path) -> tuple[RankContent, Sharded]:
    """Content and sharded model of this rank, as training begins."""
    paths = ContentPaths(index=folder / "index", stores=folder / "stores")
    content = rank_content(settings, paths, CPU)
    assert content is not None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cluster = settings.cluster.model_copy(update={"num_workers": world_size})
    plan = folder / f"plan-{rank}.json"
    planned = plan_recipe(settings.model_copy(update={"cluster": cluster}), world_size)
    plan.write_text(planned.model_dump_json())
    return content, build(settings, plan, CPU, content)


def announced_batches(
    content: RankContent, settings: Recipe, folder: Path
) -> Iterator[RankingBatch]:
    """This rank's batches."""
    files = SampleFiles(
        [folder / "samples.parquet"], settings.features, ["click"], items=content.items
    )
    return content.source.ahead(_batches(files, dist.get_rank(), dist.get_world_size()))


def _train(settings: Recipe, folder: Path) -> dict[str, Any]:
    content, sharded = build_rank(settings, folder)
    sharded.model.train()
    batches = announced_batches(content, settings, folder)
    world_size = dist.get_world_size()
    steps, loss = PlainSteps(sharded.model, sharded.optimizer), TaskLoss([1.0])
    losses: list[float] = []
    metrics: dict[str, float] = {}
    for _ in range(NUM_STEPS):
        mean = loss(*steps.run(batches)[:3]) / world_size
        content.source.learn(1.0)
        dist.all_reduce(mean)
        losses.append(float(mean))
        metrics = content.source.metrics()
    content.source.refresh()
    beside = content.source.tensors()
    beside.pop("step", None)
    found = {
        "losses": losses,
        "metrics": metrics,
        "tables": {name: table.weight for name, table in gather_tables(sharded).items()},
        "dense": {n: p.detach().clone() for n, p in sharded.dense_parameters.items()},
        "beside": {name: value.clone() for name, value in beside.items()},
    }
    content.source.close()
    return found


def _batches(files: SampleFiles, rank: int, world_size: int) -> Iterator[RankingBatch]:
    """This rank's part of every global batch."""
    plan = EpochPlan.sequential(files.rows_per_group)
    parts = [files.rows(files.decode(plan, segment)) for segment in plan.remaining(())]
    rows: Rows = concat_rows(parts)
    size = GLOBAL_BATCH // world_size
    for step in range(NUM_STEPS):
        start = step * GLOBAL_BATCH + rank * size
        yield rows.cut(start, start + size).to_batch(size)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Greatest absolute difference of all tensors."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)

"""Training on process groups: TorchRec's pipeline, and two ranks that must agree."""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embedding.config import (
    DataParallel,
    RowWise,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
    SparseOptimizer,
)
from embedding.feature_schema import FeatureSchema
from embedding.loader import SampleFiles, SampleLoader
from embedding.shard import Sharded
from ranking.averaging import DenseAverage
from ranking.classifier_config import DeepFm
from ranking.config import ModelConfig, RankingConfig, TaskConfig
from ranking.experts_config import ProgressiveExtractionConfig
from ranking.fgcnn_config import Fgcnn
from ranking.interest_config import Dien, Din, Hstu
from ranking.model import RankingModel, RankingStep
from ranking.moments import agree_on_moments
from ranking.steps import PipelinedSteps, PlainSteps
from ranking.trainer import Trainer, TrainingHooks
from ranking.trainer_config import CosineDecay, ScheduleConfig
from ranking.validation import validate
from tests.distributed import run_distributed
from tests.embedding.toy import gather_tables
from tests.planned import shard_planned
from tests.ranking.small_run import NUM_ROWS, SCHEMA, TASKS, small_config, write_samples

CPU = torch.device("cpu")

pytestmark = pytest.mark.integration


def _sharded(
    config: RankingConfig | None = None,
    schema: FeatureSchema = SCHEMA,
    optimizer: SparseOptimizer | None = None,
    embedding_l2: float = 0.0,
) -> Sharded:
    """With Adam for the dense parameters, or, where SGD trains the tables, SGD."""
    config = config or small_config()
    model = RankingModel(schema, config, tables_device=torch.device("meta"))
    dense = (
        partial(torch.optim.Adam, lr=1e-2)
        if optimizer is None
        else partial(torch.optim.SGD, lr=RATES["dense"])
    )
    sharded = shard_planned(
        RankingStep(model, config, embedding_l2=embedding_l2),
        optimizer=optimizer or RowWiseAdagrad(),
        sharding=ShardingConfig(),
        dense_optimizer=dense,
        device=CPU,
    )
    sharded.initialize(seed=0)
    sharded.model.train()
    return sharded


def _state(sharded: Sharded) -> list[torch.Tensor]:
    tables = [piece.weight_RD.clone() for piece in sharded.shards]
    return tables + [p.detach().clone() for p in sharded.dense_parameters.values()]


def _check_pipeline(folder: Path) -> None:
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    with SampleLoader(files, batch_size_per_rank=16).sequential() as stream:
        batches = list(stream)[:6]
    plain, piped = _sharded(), _sharded()
    for batch in batches:
        torch.manual_seed(0)
        plain.optimizer.zero_grad()
        loss, _ = plain.model(batch)
        loss.backward()
        plain.optimizer.step()
    pipeline = TrainPipelineSparseDist(piped.model, piped.optimizer, CPU)
    source = iter(batches)
    for _ in batches:
        torch.manual_seed(0)
        pipeline.progress(source)
    # Both collections were found by tracing, so their input dist overlaps; nothing was skipped.
    assert len(pipeline._pipelined_modules) == 2
    for ours, theirs in zip(_state(plain), _state(piped), strict=True):
        assert ours.equal(theirs)


def test_the_pipeline_used_on_gpus_trains_what_the_plain_loop_does(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(_check_pipeline, 1, tmp_path)


def _demanding_config() -> RankingConfig:
    """A task after another, and all kinds of interests: whatever tracing could stumble on."""
    return RankingConfig(
        tasks=(TaskConfig(name="click"), TaskConfig(name="like", after="click")),
        model=ModelConfig(
            interests=(Din(history="past"), Dien(history="past"), Hstu(history="past")),
            experts=ProgressiveExtractionConfig(),
        ),
        trainer=small_config().trainer,
    )


def _check_pauses(folder: Path) -> None:
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    source = SampleLoader(files, batch_size_per_rank=16)
    with source.sequential() as stream:
        batches = list(stream)[:7]
    runs = []
    for kind in (PlainSteps, partial(PipelinedSteps, device=CPU)):
        sharded = _sharded(_demanding_config(), embedding_l2=0.1)
        steps, values, batch_source = kind(sharded.model, sharded.optimizer), [], iter(batches)
        for index in range(7):
            torch.manual_seed(0)
            steps.run(batch_source)
            if isinstance(steps, PipelinedSteps):
                assert len(steps._pipeline._pipelined_modules) == 2  # tracing lost nothing
            if index in (1, 4, 6):  # in the middle, and where nothing is under way
                steps.pause()
                values.append(validate(sharded.model, source, CPU, 2))
        steps.pause()
        values.append(validate(sharded.model, source, CPU, 2))
        runs.append((values, _state(sharded)))
    (plain_values, plain_state), (piped_values, piped_state) = runs
    assert piped_values == plain_values
    assert plain_values[-1] == plain_values[-2] != plain_values[0]
    for ours, theirs in zip(piped_state, plain_state, strict=True):
        assert ours.equal(theirs)


def test_the_pipeline_goes_on_after_validation_as_if_there_had_been_none(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(_check_pauses, 1, tmp_path)


RATES = {"user": 0.1, "item": 0.4, "dense": 0.05}


def _check_rates(folder: Path) -> None:
    """Fused SGD, SGD of a data-parallel table and dense SGD, against one plain SGD."""
    tables = (
        SCHEMA.tables[0].model_copy(update={"sharding": DataParallel()}),
        SCHEMA.tables[1].model_copy(update={"sharding": RowWise(), "learning_rate": RATES["item"]}),
    )
    schema = SCHEMA.model_copy(update={"tables": tables})
    config = small_config(
        epochs=1, schedule=ScheduleConfig(warmup_steps=6, decay=CosineDecay(final_factor=0.1))
    )
    sharded = _sharded(config, schema, Sgd(learning_rate=RATES["user"]), embedding_l2=0.5)
    twin = RankingModel(SCHEMA, config, tables_device=CPU)
    twin.tables.initialize(seed=0)
    groups = {name: [p for n, p in twin.named_parameters() if _part(n) == name] for name in RATES}
    plain = torch.optim.SGD([{"params": groups[name], "lr": RATES[name]} for name in RATES])
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    hooks = TrainingHooks(*(lambda *_: None,) * 3)
    for model, optimizer in (
        (sharded.model, sharded.optimizer),
        (RankingStep(twin, config, embedding_l2=0.5), plain),
    ):
        trainer = Trainer(
            config.trainer, TASKS, model=model, optimizer=optimizer, device=CPU, hooks=hooks
        )
        trainer.fit(SampleLoader(files, batch_size_per_rank=16))
        assert trainer.rate_factor < 0.2
    theirs = dict(twin.tables.named_parameters())
    for piece in sharded.shards:
        (expected,) = [
            w for name, w in theirs.items() if _part(f"tables.{name}") == piece.table.name
        ]
        torch.testing.assert_close(piece.weight_RD, expected.detach(), rtol=1e-4, atol=1e-6)
    dense = [p for n, p in twin.named_parameters() if _part(n) == "dense"]
    for ours, expected in zip(sharded.dense_parameters.values(), dense, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def _part(name: str) -> str:
    return name.split(".")[-2] if name.startswith("tables.") else "dense"


def test_schedule_and_penalty_reach_fused_tables_as_they_reach_a_dense_twin(
    tmp_path: Path,
) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(_check_rates, 1, tmp_path)


def _with_batch_norm() -> RankingConfig:
    config = small_config()
    generator = Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,), batch_norm=True)
    return config.model_copy(
        update={"model": config.model.model_copy(update={"generator": generator})}
    )


def _check_moments(rank: int) -> None:
    """Ranks with halves of the rows agree on the moments of all of them."""
    rows_RBC = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    rows_RBC[1] += 2
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.copy_(rows_RBC[rank].mean(dim=0))
    norm.running_var.copy_(rows_RBC[rank].var(dim=0, correction=0))
    average = DenseAverage(torch.nn.Sequential(norm), decay=0.9)
    both = torch.nn.ModuleList([norm, average])
    agree_on_moments(both)
    (average_mean,), (average_variance,) = average.moments()
    for mean, variance in (
        (norm.running_mean, norm.running_var),
        (average_mean, average_variance),
    ):
        torch.testing.assert_close(mean, rows_RBC.mean(dim=(0, 1)))
        torch.testing.assert_close(variance, rows_RBC.var(dim=(0, 1), correction=0))
    before = norm.state_dict()["running_var"].clone()
    agree_on_moments(both)
    assert norm.running_var.equal(before)


def _fit(folder: Path) -> None:
    rank = dist.get_rank()
    _check_moments(rank)
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    sharded = _sharded(_with_batch_norm())
    moments = [b for name, b in sharded.model.named_buffers() if "running_" in name]
    start = [moment.clone() for moment in moments]
    reports: dict[int, dict[str, float]] = {}
    saved: list[Any] = []
    trainer = Trainer(
        small_config().trainer,
        TASKS,
        model=sharded.model,
        optimizer=sharded.optimizer,
        device=CPU,
        hooks=TrainingHooks(
            report=lambda reached, metrics: reports.__setitem__(reached.step, metrics),
            save=saved.append,
            validated=lambda *_: None,
        ),
    )
    source = SampleLoader(files, batch_size_per_rank=16, rank=rank, world_size=2)
    summary = trainer.fit(source)
    progress = [(p.step, p.position.model_dump_json(), p.window_TX.tolist()) for p in saved]
    torch.save(
        {
            "rows": summary.totals.rows,
            "reports": {
                step: {k: v for k, v in m.items() if k.startswith(("train/click", "train/loss"))}
                for step, m in reports.items()
            },
            "progress": progress,
            "dense": [p.detach().clone() for p in sharded.dense_parameters.values()],
            "moments": moments,
            "start": start,
        },
        folder / f"rank{rank}.pt",
    )


def test_two_ranks_report_and_save_the_same(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(_fit, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["reports"] == second["reports"]
    assert first["progress"] == second["progress"]
    assert first["rows"] == second["rows"] == 2 * NUM_ROWS
    clicks = sum(metrics["train/click/weight"] for metrics in first["reports"].values())
    assert clicks == 2 * NUM_ROWS
    for ours, theirs in zip(first["dense"], second["dense"], strict=True):
        assert ours.equal(theirs)
    assert len(first["moments"]) == 2
    for ours, theirs, start in zip(
        first["moments"], second["moments"], first["start"], strict=True
    ):
        assert ours.equal(theirs)
        assert not ours.equal(start)


def _without_events(folder: Path) -> None:
    table = pq.read_table(folder / "part.parquet")
    index = table.schema.get_field_index("sequence:past_item")
    nothing = pa.array([[]] * len(table), pa.list_(pa.int64()))
    pq.write_table(table.set_column(index, "sequence:past_item", nothing), folder / "empty.parquet")


def _train_without_events(folder: Path) -> None:
    """Rank 1 has events in the first and the last step only."""
    rank = dist.get_rank()
    tasks = ["click", "like"]
    batches = {}
    for name in ("part", "empty"):
        files = SampleFiles([folder / f"{name}.parquet"], SCHEMA, tasks)
        with SampleLoader(files, batch_size_per_rank=16).sequential() as stream:
            batches[name] = list(stream)[:4]
    sharded = _sharded(_demanding_config())
    start = _state(sharded)
    for step in range(4):
        name = "empty" if rank == 1 and step in (1, 2) else "part"
        sharded.optimizer.zero_grad()
        loss, _ = sharded.model(batches[name][step])
        loss.backward()
        sharded.optimizer.step()
    assert any(not ours.equal(before) for ours, before in zip(_state(sharded), start, strict=True))
    for parameter in sharded.dense_parameters.values():
        of_rank_0 = parameter.detach().clone()
        dist.broadcast(of_rank_0, 0)
        assert of_rank_0.equal(parameter)


def test_a_rank_without_any_event_trains_on(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    _without_events(tmp_path)
    run_distributed(_train_without_events, 2, tmp_path)


SHARDINGS = ("data_parallel", "row_wise", "table_wise")


def _train_on_parts(folder: Path) -> None:
    """Trains on batches of 32 rows, cut in as many parts as there are ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    config = small_config()
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"classifier": DeepFm(hidden=(16,))})}
    )
    found = {}
    for sharding in SHARDINGS:
        data = SCHEMA.model_dump()
        for table in data["tables"]:
            table["sharding"] = {"kind": sharding}
        sharded = _sharded(config, FeatureSchema.model_validate(data))
        with SampleLoader(files, batch_size_per_rank=32 // world_size).sequential() as stream:
            parts = list(stream)
        for step in range(8):
            sharded.optimizer.zero_grad()
            loss, _ = sharded.model(parts[step * world_size + rank])
            loss.backward()
            sharded.optimizer.step()
        found[sharding] = {
            "dense": [p.detach().clone() for p in sharded.dense_parameters.values()],
            "tables": [table.weight for table in gather_tables(sharded).values()],
        }
    if rank == 0:
        torch.save(found, folder / f"world{world_size}.pt")


def test_two_ranks_train_what_one_rank_trains_on_both_their_batches(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    for world_size in (1, 2):
        run_distributed(_train_on_parts, world_size, tmp_path)
    one, two = (torch.load(tmp_path / f"world{world_size}.pt") for world_size in (1, 2))
    for sharding in SHARDINGS:
        for kind in ("dense", "tables"):
            for ours, theirs in zip(two[sharding][kind], one[sharding][kind], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

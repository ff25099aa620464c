"""Resume, retention, damage, warm start, growth and export of checkpoints, in two spawns."""

import dataclasses
import errno
import gc
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from embedding import stored
from embedding.checkpoint import Checkpointer, load_into
from embedding.checkpoint_files import MANIFEST, read_manifest, step_directory, steps
from embedding.config import (
    Adagrad,
    Hashed,
    ManagedCollision,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
)
from embedding.errors import UserError
from embedding.hashing import NO_ID
from embedding.id_map import by_row, managed_modules
from embedding.restore import device_of_step
from embedding.shard import Sharded
from embedding.stored import CheckpointReader, read_dense, read_id_map, read_tables
from tests.distributed import run_distributed
from tests.embedding.toy import gather_tables, toy_batch, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration
OPTIMIZER = RowWiseAdagrad()


def test_fused_optimizers_count_steps_beside_the_parameter() -> None:
    """Their kernels refuse a counter on another device; others want it on the host."""
    host, elsewhere = (torch.nn.Parameter(torch.empty(2, device=d)) for d in ("cpu", "meta"))
    optimizer = torch.optim.AdamW([{"params": [host]}, {"params": [elsewhere]}])
    assert device_of_step(optimizer, elsewhere).type == "cpu"
    for key in ("fused", "capturable"):
        optimizer.param_groups[1].update({"fused": None, "capturable": False, key: True})
        assert device_of_step(optimizer, elsewhere).type == "meta"
    assert device_of_step(optimizer, host).type == "cpu"


def test_two_ranks(tmp_path: Path) -> None:
    run_distributed(_check_two_ranks, 2, tmp_path)


def _check_two_ranks(directory: Path) -> None:
    _check_exact_resume(directory / "resume")
    _check_a_full_disk_is_said_to_be_one(directory / "full")
    _check_ranks_restore_the_same_step(directory / "views")
    _check_evicted_rows_start_anew()


def _check_nothing_is_left_of_a_checkpointer(directory: Path) -> None:
    """A process that is kept for many trainings ran out of threads and file descriptors."""
    sharded = _build()

    def held() -> tuple[int, int]:
        gc.collect()
        threads, files = (list(Path("/proc/self", kind).iterdir()) for kind in ("task", "fd"))
        return len(threads), len(files)

    def save_and_close(name: str) -> None:
        with Checkpointer(directory / name, keep=1) as checkpointer:
            checkpointer.save(1, sharded, {}, wait=False)

    def fail(name: str) -> None:
        with Checkpointer(directory / name, keep=1) as checkpointer:
            checkpointer.save(1, sharded, {}, wait=False)
            raise UserError("training has diverged")

    save_and_close("first")
    before = held()
    for turn in range(5):
        save_and_close(f"closed-{turn}")
        with pytest.raises(UserError, match="diverged"):
            fail(f"failed-{turn}")
    assert held() == before


def _build(sharding: str = "row_wise", ids=Hashed(), seed: int = 7, scale: int = 1) -> Sharded:  # noqa: B008
    hosts = ShardingConfig(ranks_per_host=dist.get_world_size())
    return toy_sharded(toy_schema(sharding, ids, scale), OPTIMIZER, hosts, seed)


def _check_exact_resume(directory: Path) -> None:
    for wait in (True, False):
        for sharding, ids in (
            ("column_wise", Hashed()),
            ("data_parallel", Hashed()),
            ("row_wise", ManagedCollision(eviction="distance_lfu", eviction_interval_steps=3)),
        ):
            sharded = _build(sharding, ids)
            checkpointer = Checkpointer(directory / f"{sharding}-{wait}", keep=2)
            train(sharded, range(4), 60)
            own = {"rank": dist.get_rank()}
            of_all = {"position": 4} if dist.get_rank() == 0 else {}
            checkpointer.save(4, sharded, {**of_all, **own}, wait=wait)
            drawn = torch.rand(3)
            losses = train(sharded, range(4, 9), 60)
            checkpointer.wait()

            resumed = _build(sharding, ids, seed=8)
            progress = checkpointer.load(4, resumed)
            assert progress == {"position": 4, **own}
            assert torch.equal(torch.rand(3), drawn), "random generators differ"
            assert train(resumed, range(4, 9), 60) == losses
            for name, table in gather_tables(resumed).items():
                assert torch.equal(table.weight, gather_tables(sharded)[name].weight)
            checkpointer.close()


def _check_a_full_disk_is_said_to_be_one(directory: Path) -> None:
    """On all ranks, in the foreground and in the background, by the operating system's own error.

    /dev/full takes the place of the file of the second rank.
    """

    @contextmanager
    def stream(_: FileSystem, path: Path, mode: str) -> Iterator[IO[bytes]]:
        taken = Path("/dev/full") if path.name.startswith("__1_") else path
        with taken.open(mode) as file:
            yield file

    def save(checkpointer: Checkpointer, wait: bool) -> None:
        checkpointer.save(1, sharded, {}, wait=wait)
        checkpointer.wait()

    sharded = _build()
    for wait in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileSystem, "create_stream", stream)
            checkpointer = Checkpointer(directory, keep=1)
            with pytest.raises(OSError, match="No space left") as raised:
                save(checkpointer, wait)
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(directory / ".step-00000001.partial")
        checkpointer.close()
        dist.barrier()  # the first rank deletes
        assert not list(directory.iterdir()), "what was written takes room that others need"
        dist.barrier()


def _check_ranks_restore_the_same_step(directory: Path) -> None:
    """Also while one rank sees other files than the others, as on a lagging file system."""
    sharded = _build()
    checkpointer = Checkpointer(directory, keep=2)
    weights = {}
    for step in (1, 2):
        train(sharded, range(step, step + 1))
        checkpointer.save(step, sharded, {"step": step})
        weights[step] = gather_tables(sharded)["user"].weight
    checkpointer.close()
    for unseen_by, name, expected in (
        (0, MANIFEST, 1),
        (1, MANIFEST, 2),  # the first rank tells the others
        (1, "__0_0.distcp", 1),  # which the second rank checks
    ):
        view = directory / f"view-{unseen_by}-{expected}" / str(dist.get_rank())
        shutil.copytree(directory, view, ignore=shutil.ignore_patterns("view-*"))
        if dist.get_rank() == unseen_by:
            (step_directory(view, 2) / name).unlink()
        if name == MANIFEST:
            load_into(view, sharded)
            assert torch.equal(gather_tables(sharded)["user"].weight, weights[expected])
        checkpointer = Checkpointer(view, keep=2)
        assert checkpointer.load_latest(sharded) == (expected, {"step": expected})
        assert torch.equal(gather_tables(sharded)["user"].weight, weights[expected])
        checkpointer.close()


def _check_evicted_rows_start_anew() -> None:
    """After an eviction, ids that just got their row have no optimizer state; old ones keep it."""
    ids = ManagedCollision(eviction="lru", eviction_interval_steps=4)
    hosts = ShardingConfig(ranks_per_host=2)
    sharded = toy_sharded(toy_schema("row_wise", ids), Adagrad(), hosts)
    train(sharded, range(7), 500)
    before = {name: by_row(m)["ids"] for name, m in managed_modules(sharded.model).items()}
    sharded.model.zero_grad()
    # The forward of step 8 evicts; without a backward no state can grow again.
    with torch.no_grad():
        sharded.model(toy_batch(sharded.schema, 8000 + dist.get_rank(), 500))
    num_changed = 0
    for shard in sharded.shards:
        after = by_row(managed_modules(sharded.model)[shard.table.name])["ids"]
        changed = after != before[shard.table.name]
        num_changed += int(changed.sum())
        assert (shard.states["momentum1"][changed] == 0).all()
        assert (shard.states["momentum1"][~changed] != 0).any()
    assert num_changed, "nothing was evicted"


def test_one_rank(tmp_path: Path) -> None:
    run_distributed(_check_one_rank, 1, tmp_path)


def _check_one_rank(directory: Path) -> None:
    _check_nothing_is_left_of_a_checkpointer(directory / "left")
    _check_retained_step(directory / "retained")
    _check_retention_and_damage(directory / "damage")
    _check_damaged_manifest(directory / "manifest")
    _check_damaged_steps_do_not_count_as_kept(directory / "kept")
    _check_nothing_is_dropped_silently(directory / "silent")
    _check_warm_start(directory / "warm")
    _check_companion(directory / "companion")
    _check_growth(directory / "growth")
    _check_export(directory / "export")


def _saved(directory: Path, sharded: Sharded, step: int = 3) -> Checkpointer:
    checkpointer = Checkpointer(directory, keep=2)
    checkpointer.save(step, sharded, {"step": step})
    return checkpointer


def _check_retained_step(directory: Path) -> None:
    sharded = _build()
    checkpointer = Checkpointer(directory, keep=1)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)):
        checkpointer.save(step, sharded, {}, retain=best)
        assert sorted(steps(directory)) == sorted({best, step})


def _check_retention_and_damage(directory: Path) -> None:
    sharded = _build()
    checkpointer = Checkpointer(directory, keep=2)
    assert checkpointer.latest_step() is None
    assert checkpointer.load_latest(sharded) is None
    weights = {}
    for step in (1, 2, 3):
        train(sharded, range(step, step + 1))
        checkpointer.save(step, sharded, {"step": step})
        weights[step] = gather_tables(sharded)["user"].weight
    assert sorted(steps(directory)) == [2, 3]
    assert not list(directory.glob(".*")), "a partial directory was left"

    (data,) = step_directory(directory, 3).glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="another checksum"):
        checkpointer.load(3, sharded)
    with pytest.raises(UserError, match="another checksum; restore it from a copy, or make it ag"):
        load_into(directory, sharded)
    data.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"has {len(content) - 100} bytes instead of"):
        checkpointer.load(3, sharded)
    assert checkpointer.latest_step() == 2
    assert checkpointer.load_latest(sharded) == (2, {"step": 2})
    assert torch.equal(gather_tables(sharded)["user"].weight, weights[2])
    assert sorted(steps(directory)) == [2]
    assert (directory / ".step-00000003.damaged" / MANIFEST).exists()
    # A killed save leaves a partial directory, which is never taken for a checkpoint.
    checkpointer.save(3, sharded, {})
    step_directory(directory, 3).rename(directory / ".step-00000004.partial")
    assert checkpointer.latest_step() == 2
    checkpointer.close()


def _check_damaged_manifest(directory: Path) -> None:
    sharded = _build()
    checkpointer = Checkpointer(directory, keep=2)
    for content in (b"", b"{", b"\xff\x00", b"{}"):
        for step in (1, 2):
            checkpointer.save(step, sharded, {"step": step})
        path = step_directory(directory, 2) / MANIFEST
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged"):
            read_manifest(path.parent)
        assert checkpointer.latest_step() == 1
        assert checkpointer.load_latest(sharded) == (1, {"step": 1})
    checkpointer.close()


def _check_damaged_steps_do_not_count_as_kept(directory: Path) -> None:
    sharded = _build()
    checkpointer = Checkpointer(directory, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, sharded, {"step": step})
    next(step_directory(directory, 3).glob("*.distcp")).unlink()
    checkpointer.save(1, sharded, {"step": 1})
    assert sorted(steps(directory)) == [1, 2, 3], "the step just written is kept"
    assert checkpointer.load_latest(sharded) == (2, {"step": 2})
    checkpointer.save(4, sharded, {"step": 4})
    assert sorted(steps(directory)) == [2, 4]
    checkpointer.close()


def _check_nothing_is_dropped_silently(directory: Path) -> None:
    sharded = _build()
    train(sharded, range(2))
    _saved(directory, sharded).close()
    hosts = ShardingConfig(ranks_per_host=1)
    with pytest.raises(UserError, match="sparse optimizer was row_wise_adagrad, is sgd"):
        _load(directory, toy_sharded(toy_schema("row_wise"), Sgd(), hosts))
    with pytest.raises(UserError, match="table item had 41 rows, has 82"):
        _load(directory, _build(scale=2))
    fewer = _build()
    del fewer.dense_parameters["linear.bias"]
    with pytest.raises(UserError, match="saved but not needed: dense/linear.bias"):
        _load(directory, fewer)
    more = _build()
    more.dense_parameters["extra"] = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="missing or of another shape: 'dense/extra'"):
        _load(directory, more)


def _load(directory: Path, sharded: Sharded) -> None:
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.load(3, sharded)
    checkpointer.close()


def _check_warm_start(directory: Path) -> None:
    yesterday = _build()
    train(yesterday, range(3))
    _saved(directory, yesterday).close()
    schema = yesterday.schema
    user = schema.table("user").model_copy(update={"num_embeddings": 31})
    tables = tuple(user if table.name == "user" else table for table in schema.tables)
    schema = schema.model_copy(update={"tables": tables})
    today = toy_sharded(schema, OPTIMIZER, ShardingConfig(ranks_per_host=1), seed=20)
    fresh = gather_tables(today)["user"].weight

    report = load_into(directory, today)

    assert "tables/item" in report.carried
    assert "dense/linear.weight" in report.carried
    assert "hash to other rows" in report.initialised["tables/user"]
    assert set(report.ignored) == {"tables/user/weight", "tables/user/momentum1@0:16"}
    held, before = gather_tables(today), gather_tables(yesterday)
    assert torch.equal(held["user"].weight, fresh)
    for name in ("item", "genre", "city"):
        assert torch.equal(held[name].weight, before[name].weight)
        (state,), (expected,) = (t[name].states["momentum1"].values() for t in (held, before))
        assert torch.equal(state, expected)
    with pytest.raises(UserError, match="nowhere has no complete checkpoint.* make it again"):
        load_into(directory / "nowhere", today)


class _Beside:
    """Trains nothing, but is saved: a matrix and a counter."""

    def __init__(self, start: float) -> None:
        self.state = {"encoder/weight": torch.full((3, 2), start), "step": torch.tensor(start)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.state

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert tensors["step"].shape == (1,)
        self.state = dict(tensors)

    def warm_start(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        self.state["encoder/weight"] = tensors["encoder/weight"]
        return {"step": "starts anew"}


def _check_companion(directory: Path) -> None:
    saved = dataclasses.replace(_build(), companion=_Beside(4.0))
    checkpointer = _saved(directory, saved)
    resumed = dataclasses.replace(_build(seed=8), companion=_Beside(0.0))
    checkpointer.load(3, resumed)
    assert resumed.companion is not None
    assert resumed.companion.tensors()["encoder/weight"].equal(torch.full((3, 2), 4.0))
    assert resumed.companion.tensors()["step"] == 4
    with pytest.raises(UserError, match="saved but not needed: companion/encoder/weight"):
        checkpointer.load(3, _build(seed=8))
    started = dataclasses.replace(_build(seed=8), companion=_Beside(0.0))
    report = load_into(directory, started)
    assert "companion/encoder/weight" in report.carried
    assert report.initialised == {"companion/step": "starts anew"}
    assert started.companion is not None
    assert started.companion.tensors()["encoder/weight"].equal(torch.full((3, 2), 4.0))


def _check_growth(directory: Path) -> None:
    ids = ManagedCollision(eviction="lfu", eviction_interval_steps=2)
    small = _build(ids=ids)
    train(small, range(5), 20)
    _saved(directory, small).close()
    big = _build(ids=ids, scale=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "BLOCK_BYTES", 64)
        patch.setattr(CheckpointReader, "read_into", _in_blocks_of_ids(8))
        _load(directory, big)
    for name, module in managed_modules(big.model).items():
        old = by_row(managed_modules(small.model)[name])["ids"]
        new = by_row(module)["ids"]
        old_ids = set(old[old != NO_ID].tolist())
        assert old_ids == set(new[new != NO_ID].tolist())
        assert old_ids
        weights, expected = gather_tables(big)[name].weight, gather_tables(small)[name].weight
        for raw_id in old_ids:
            (row,), (old_row,) = (new == raw_id).nonzero(), (old == raw_id).nonzero()
            assert torch.equal(weights[row], expected[old_row])
    # Back to the small table: what does not fit is dropped, counted and logged.
    train(big, range(5, 15), 400)
    Checkpointer(directory / "big", keep=1).save(3, big, {})
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("embedding.restore").addHandler(handler)
    _load(directory / "big", small)
    assert any("ids found no room and were evicted" in message for message in messages)


def _in_blocks_of_ids(most: int):
    """`read_into` that allows to read so many elements of a tensor of id maps at a time."""
    read_into = CheckpointReader.read_into

    def read(self, name: str, target: torch.Tensor, offset: Sequence[int]) -> None:
        assert not name.startswith("managed/") or target.numel() <= most, name
        read_into(self, name, target, offset)

    return read


def _check_export(directory: Path) -> None:
    ids = ManagedCollision(eviction="lfu", eviction_interval_steps=2)
    sharded = _build(ids=ids)
    train(sharded, range(3))
    _saved(directory, sharded).close()
    folder = step_directory(directory, 3)
    expected = gather_tables(sharded)
    names = []
    for name, blocks in read_tables(folder):
        names.append(name)
        weight = torch.cat([block for _, block in blocks])
        assert torch.equal(weight, expected[name].weight)
    assert names == ["item", "user", "genre", "city"]
    dense = read_dense(folder)
    assert dense.keys() == {"linear.weight", "linear.bias"}
    assert torch.equal(dense["linear.bias"], sharded.dense_parameters["linear.bias"])
    held = by_row(managed_modules(sharded.model)["user"])["ids"]
    assert torch.equal(read_id_map(folder, "user"), held)
    assert read_manifest(folder).segments("user") == [(0, 30)]
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_manifest(folder)

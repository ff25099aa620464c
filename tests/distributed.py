"""Runs a function on every rank of a gloo process group of processes of its own.

Ranks are forked from a process that has only imported what they need, once for all tests: a fresh
interpreter spends seconds on these imports, whatever it runs.
"""

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=300)
PRELOADED = "tests.preloaded"
"""What is imported before the fork."""


def run_distributed(
    fn: Callable[..., None], world_size: int, *args: Any, fresh: bool = False
) -> None:
    """Call `fn(*args)` on `world_size` ranks; raise the first rank's error with its traceback.

    Every process must also exit with code 0. What they write to stderr is this process's, too.

    Args:
        fn: importable (a module-level function).
        world_size: number of ranks.
        args: of `fn`.
        fresh: in interpreters of their own, for tests of how these end.
    """
    with tempfile.TemporaryDirectory() as directory:
        # What CUDA was asked in the process that forks, its forks can ask no more.
        is_fresh = fresh or torch.cuda.is_available()
        context = _processes(is_fresh)
        processes = [
            context.Process(
                target=_run_rank, args=(rank, world_size, Path(directory), fn, args, is_fresh)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        failed: list[str] = []
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(timeout=0.2)
            failed = [path.read_text() for path in sorted(Path(directory).glob("error-*"))]
            if failed or any(process.exitcode for process in processes):
                # The others may wait for the failed rank forever.
                for process in processes:
                    process.join(timeout=2)
                    process.kill()
        for process in processes:
            process.join()
        for said in sorted(Path(directory).glob("stderr-*")):
            sys.stderr.write(said.read_text(errors="replace"))
        if failed:
            raise AssertionError("\n\n".join(failed))
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes of the ranks: {codes}"


def _processes(fresh: bool) -> Any:
    if fresh:
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _run_rank(
    rank: int,
    world_size: int,
    directory: Path,
    fn: Callable[..., None],
    args: tuple[Any, ...],
    fresh: bool,
) -> None:
    # Forks have the stderr of the test that was the first to need any.
    os.dup2(os.open(directory / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    # The server of forks ignores what it cannot import, and every fork would import its own.
    assert fresh or PRELOADED in sys.modules
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        fn(*args)
        dist.barrier()
    except BaseException:
        partial = directory / f"partial-{rank}"
        partial.write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        partial.rename(directory / f"error-{rank}")
        raise
    finally:
        # Pipelines and DDP hold process groups in reference cycles. Left to the interpreter's exit,
        # a group could go while its threads still run, and the process would abort.
        gc.collect()
        dist.destroy_process_group()

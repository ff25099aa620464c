"""What runs on every rank of `braid bench plan`. Torch and torchrec are imported here."""

import gc
import json
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from embedding.batch import RankingBatch
from embedding.memory import keep_freed_memory
from embedding.notices import divert_library_notices
from embedding.planning.part_timing import time_parts
from embedding.planning.plan_description import PlanDescription
from embedding.planning.plan_timing import PlanRun, measure_peak_bytes, time_plans
from embedding.planning.synthetic_batches import synthetic_batch
from embedding.planning.workload import table_loads
from pipeline.devices import own_device
from pipeline.planning.bench import PARTS, PROGRESS, RESULTS, BenchCase, BenchJob, MeasuredRun

TOGETHER_BYTES = 1 << 31
"""Table weights a rank holds at once; plans that take turns are all in memory."""


def bench_worker(job: BenchJob) -> None:
    """Measure all plans; rank 0 writes a line for each."""
    divert_library_notices(job.output / "logs" / f"notices-rank-{dist.get_rank():05d}.log")
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    peaks = {}
    # Memory first: later on, the process keeps what it has freed.
    if job.effort.memory_steps:
        for case in job.cases:
            peaks[case.name] = [_peaks(case, plan, job, device) for plan in case.plans]
    keep_freed_memory()
    if job.time_parts:
        parts = time_parts(device)
        if dist.get_rank() == 0:
            (job.output / PARTS).write_text(json.dumps(parts))
    (job.output / RESULTS).touch()
    for case in job.cases:
        runs = _measure(case, peaks.get(case.name), job, device)
        if dist.get_rank() == 0:
            with (job.output / RESULTS).open("a") as file:
                file.writelines(run.model_dump_json() + "\n" for run in runs)
    dist.barrier()


def _peaks(
    case: BenchCase, plan: PlanDescription, job: BenchJob, device: torch.device
) -> tuple[int, ...]:
    make = partial(_plan_run, case, plan, _batches(case, job, device), device)
    mine = measure_peak_bytes(make, job.effort.memory_steps, device)
    gathered: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    gc.collect()
    _advance(job, 1)
    return tuple(gathered)


def _measure(
    case: BenchCase,
    peaks: list[tuple[int, ...]] | None,
    job: BenchJob,
    device: torch.device,
) -> list[MeasuredRun]:
    batches = _batches(case, job, device)
    effort = job.effort
    measured = []
    for first, plans in _in_turns(case.plans):
        runs = [_plan_run(case, plan, batches, device) for plan in plans]
        times = time_plans(
            runs,
            warmup=effort.warmup_steps,
            rounds=effort.rounds,
            steps_per_round=effort.steps_per_round,
            min_seconds=effort.min_seconds,
        )
        measured += [
            MeasuredRun(
                case=case.name,
                plan_index=first + offset,
                step_s=time.step_s,
                halves_s=time.halves_s,
                phase_s=time.phase_s,
                num_steps=time.num_steps,
                peak_bytes=peaks[first + offset] if peaks else (),
            )
            for offset, time in enumerate(times)
        ]
        _advance(job, len(runs))
        del runs
        gc.collect()
    return measured


def _advance(job: BenchJob, measurements: int) -> None:
    if dist.get_rank() == 0:
        with (job.output / PROGRESS).open("ab") as file:
            file.write(b"." * measurements)


def _in_turns(
    plans: tuple[PlanDescription, ...],
) -> Iterator[tuple[int, tuple[PlanDescription, ...]]]:
    """As many plans together as fit in memory."""
    start, held = 0, 0
    for index, plan in enumerate(plans):
        size = 3 * max(plan.weight_bytes_per_rank())
        if index > start and held + size > TOGETHER_BYTES:
            yield start, plans[start:index]
            start, held = index, 0
        held += size
    yield start, plans[start:]


def _batches(case: BenchCase, job: BenchJob, device: torch.device) -> list[RankingBatch]:
    loads = table_loads(case.features, case.traffic, case.exponent)
    seeds = (1000 * number + dist.get_rank() for number in range(job.effort.batches))
    return [
        synthetic_batch(case.features, loads, case.batch_size_per_rank, seed).to(device)
        for seed in seeds
    ]


def _plan_run(
    case: BenchCase, plan: PlanDescription, batches: list[RankingBatch], device: torch.device
) -> PlanRun:
    return PlanRun(
        case.features,
        plan,
        optimizer=case.optimizer,
        sharding=case.sharding,
        batches=batches,
        device=device,
    )

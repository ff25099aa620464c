"""`braid bench plan`: runs plans on a Ray Train worker group; predictions beside measurements.

The workers leave `results.jsonl` in a scratch directory; the caller writes what it wants to keep.
"""

import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from embedding.config import ShardingConfig, SparseOptimizer, StrictConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.demand import step_settings
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest
from embedding.planning.traffic import Traffic
from pipeline.cluster import cluster_address, require_absolute
from pipeline.config import ClusterConfig
from pipeline.worker_group import run_workers

RESULTS = "results.jsonl"
PARTS = "parts.json"
PROGRESS = "progress"
"""A byte for every finished measurement of a plan: its memory is one, its times are another."""
_FOLLOW_INTERVAL_S = 0.5

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""


class BenchCase(StrictConfig):
    """One table set and the plans to run of it."""

    name: str
    features: FeatureSchema
    traffic: Traffic | None = None
    exponent: float
    batch_size_per_rank: int
    optimizer: SparseOptimizer
    sharding: ShardingConfig = ShardingConfig()
    """Precision on the wire."""
    plans: tuple[PlanDescription, ...]
    """For tables at the path `tables`."""
    calibration: Path | None = None
    """Measured constants that the plans were chosen by; None: the data sheet's."""


class BenchEffort(StrictConfig):
    """How long to measure.

    A machine's state drifts: how plans of a few milliseconds compare differs by 8% between one
    stretch of four seconds and the next. So it takes a minute to tell good plans apart, however
    many steps that are.
    """

    warmup_steps: int = 3
    rounds: int = Field(default=9, ge=2)
    steps_per_round: int = 6
    min_seconds: float = 0.0
    """Rounds go on until the plans that take turns have together taken so long."""
    batches: int = 4
    """Different batches that the steps take turns with."""
    memory_steps: int = 0
    """Steps of the run that takes the peak memory; 0: it is not taken."""


@dataclass(frozen=True)
class BenchGroup:
    """The worker group that runs plans, and where its ranks write."""

    cluster: ClusterConfig
    scratch: Path | None = None
    """Directory that every node mounts at the same path; None: a temporary one of this machine."""

    def of(self, num_ranks: int) -> Self:
        """The group with another number of ranks."""
        return replace(self, cluster=self.cluster.model_copy(update={"num_workers": num_ranks}))

    def require_shared_scratch(self) -> None:
        """Refuse a directory of this machine where ranks may be on others.

        Raises:
            UserError: `RAY_ADDRESS` names a cluster, and there is no scratch directory, or it is
                a relative path.
        """
        address = cluster_address()
        if self.scratch is not None:
            require_absolute({"--scratch": self.scratch})
        elif address is not None:
            raise UserError(
                f"RAY_ADDRESS={address}: ranks on several hosts write results into one directory; "
                "give --scratch DIR, on storage that every node mounts at the same path"
            )

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """For one run of the group; it is gone after the block."""
        self.require_shared_scratch()
        if self.scratch is not None:
            self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="braid-bench-", dir=self.scratch) as folder:
            yield Path(folder).absolute()


class BenchJob(StrictConfig):
    """All a worker needs; crosses to it as JSON."""

    cases: tuple[BenchCase, ...]
    effort: BenchEffort
    output: Path
    time_parts: bool = False


class MeasuredRun(StrictConfig):
    """What one plan took."""

    case: str
    plan_index: int
    step_s: float
    halves_s: tuple[float, float]
    """Of every other round, and of the rest; they share the machine's states."""
    phase_s: dict[str, float]
    num_steps: int
    peak_bytes: tuple[int, ...] = ()
    """Per rank; empty if it was not taken."""


class PlanComparison(StrictConfig):
    """A plan's measurement beside its prediction."""

    case: str
    name: str
    """Who proposed the plan."""
    plan: str
    """Every table's placement."""
    measured_s: float
    scatter: float
    """Half the difference between halves of the measurement, as a share of it."""
    predicted_s: float
    measured_phase_s: dict[str, float]
    predicted_phase_s: dict[str, float]
    measured_peak_bytes: int | None
    predicted_peak_bytes: int

    @property
    def relative_error(self) -> float:
        """Of the predicted step time, with its sign."""
        return self.predicted_s / self.measured_s - 1


class BenchReport(StrictConfig):
    """What `braid bench plan --json` writes; version 1."""

    schema_version: Literal[1] = 1
    topology: str
    constants: str
    comparisons: tuple[PlanComparison, ...]


def run_cases(
    cases: Sequence[BenchCase],
    group: BenchGroup,
    effort: BenchEffort,
    *,
    time_parts: bool = False,
    progress: Progress | None = None,
) -> tuple[list[MeasuredRun], dict[str, float]]:
    """Run all plans on a worker group of an initialised Ray; measurements, and parts if asked.

    Raises:
        UserError: The ranks may be on several hosts, and have no directory in common.
        ray.train.TrainingFailedError: The group failed.
    """
    with group.directory() as scratch:
        job = BenchJob(
            cases=tuple(cases),
            effort=effort,
            output=scratch,
            time_parts=time_parts,
        )
        once = group.cluster.model_copy(update={"max_failures": 0})
        total = sum(len(case.plans) for case in cases) * (2 if effort.memory_steps else 1)
        with _followed(scratch / PROGRESS, total, progress):
            run_workers(_bench_worker, job, once, scratch)
        lines = (scratch / RESULTS).read_text().splitlines()
        parts = _read_parts(scratch / PARTS)
    return [MeasuredRun.model_validate_json(line) for line in lines], parts


@contextmanager
def _followed(path: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Tell `progress` how far the workers are, from a thread, until the block ends."""
    if progress is None:
        yield
        return
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_FOLLOW_INTERVAL_S):
            if path.exists():
                progress(path.stat().st_size, total)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read_parts(path: Path) -> dict[str, float]:
    parts: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return parts


def _bench_worker(config: dict[str, str]) -> None:
    """Runs on every rank; torchrec is imported here and not in the driver."""
    from pipeline.planning.bench_worker import bench_worker

    bench_worker(BenchJob.model_validate_json(config["job"]))


def case_request(case: BenchCase, shape: ClusterShape, calibration: Path | None) -> PlanRequest:
    """The request whose model prices the case's plans."""
    return PlanRequest(
        schema=case.features,
        shape=shape,
        settings=step_settings(case.batch_size_per_rank, case.optimizer, case.sharding),
        calibration=calibration,
        traffic=case.traffic,
        exponent=case.exponent,
    )

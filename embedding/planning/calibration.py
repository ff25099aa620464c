"""`calibration.json`: the cost model's constants of one machine, measured, with their residuals.

A calibration holds for the device, the processor and the library versions it was made with, and is
refused elsewhere: constants of another machine are worse than the data sheet's.
"""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, ValidationError

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.planning.cluster_shape import ClusterShape, find_machine
from embedding.planning.cost_constants import CostConstants, data_sheet_constants
from embedding.planning.counts import COUNT_NAMES, COUNTS
from embedding.planning.machines import Machine

VERSIONED = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
"""Packages whose kernels and collectives the constants describe."""
_MEASURED = ("device", "hbm_bandwidth", "intra_host_bandwidth", "pcie_bandwidth")
"""Figures of a machine that calibrated constants stand for."""
_BETWEEN_RANKS = (
    *("input_calls", "input_sent_ids", "input_lengths", "exchange_calls", "exchange_bytes"),
    *("reduce_calls", "reduce_bytes", "backward_exchange_bytes", "backward_gather_bytes"),
    *("replicated_calls", "all_reduce_bytes"),
)
"""Counts that cost a rank next to nothing while it is alone."""
_BETWEEN_HOSTS = tuple(name for name in COUNT_NAMES if name.endswith("inter_bytes"))
_PREFETCH = tuple(name for name, phase in COUNTS if phase == "prefetch")
"""Neither a part of a step nor a micro-benchmark times these."""


class Residual(StrictConfig):
    """One measured plan and what the fitted constants say of it."""

    plan: str
    measured_s: float
    predicted_s: float

    @property
    def relative_error(self) -> float:
        """Of the prediction, without its sign."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


class RanksFit(StrictConfig):
    """Constants for one number of ranks."""

    world_size: PositiveInt
    ranks_per_host: PositiveInt
    constants: CostConstants
    parts: dict[str, float]
    """Constants that micro-benchmarks measured alone, in seconds per unit."""
    residuals: tuple[Residual, ...]
    median_abs_error: float
    rank_correlation: float
    """Spearman's, of predicted and measured step times of the fitted plans."""


class Calibration(StrictConfig):
    """Measured constants of one kind of machine; version 1."""

    schema_version: Literal[1] = 1
    machine: str
    """Name in `embedding.planning.machines`."""
    device_name: str
    """As the system reports it: what the constants hold for."""
    cores: int
    versions: dict[str, str]
    created_at: str
    fits: tuple[RanksFit, ...] = Field(min_length=1)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a calibration depends on."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def processor_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def read_calibration(path: Path) -> Calibration:
    """A calibration file.

    Raises:
        UserError: It is missing, or of another schema version, or no calibration.
    """
    remedy = "write one with `braid bench plan --calibrate`"
    if not path.is_file():
        raise UserError(f"calibration {path} does not exist; {remedy}")
    try:
        return Calibration.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"{path} is no calibration of this version ({error.errors()[0]['msg']}); {remedy}"
        ) from error


def suits(calibration: Calibration, machine: Machine) -> bool:
    """Whether it was made on such a machine, or on one that a file changes in nothing measured."""
    if machine.base is None:
        return calibration.machine == machine.name
    return calibration.machine == machine.base and not _changed(calibration, machine, machine.base)


def _changed(calibration: Calibration, machine: Machine, base: str) -> list[str]:
    """Keys in which a file's machine differs from its base and that the calibration measured."""
    several_hosts = any(fit.world_size > fit.ranks_per_host for fit in calibration.fits)
    keys = (*_MEASURED, *(("inter_host_bandwidth",) if several_hosts else ()))
    known = find_machine(base)
    return [key for key in keys if getattr(machine, key) != getattr(known, key)]


def check_calibration(calibration: Calibration, shape: ClusterShape, path: Path) -> None:
    """Refuse a calibration that does not hold for this cluster and these libraries.

    Raises:
        UserError: With what differs.
    """
    machine = shape.machine
    again = "calibrate again with `braid bench plan --calibrate`, or plan without it"
    if calibration.machine != (machine.base or machine.name):
        base = f", whose base is {machine.base}" if machine.base else ""
        raise UserError(
            f"calibration {path} was made on {calibration.machine!r} ({calibration.device_name}) "
            f"and the topology is {shape.name}{base}; {again}"
        )
    if not suits(calibration, machine):
        assert machine.base is not None
        changed = ", ".join(_changed(calibration, machine, machine.base))
        raise UserError(
            f"calibration {path} measured what {shape.file} changes of {machine.base}: {changed}; "
            "leave that out of the file, or plan without the calibration"
        )
    known = installed_versions()
    for package, then in calibration.versions.items():
        now = known.get(package)
        # The CUDA and the CPU wheel of FBGEMM exclude each other: a laptop plans for GPUs.
        if now is not None and _release(now) != _release(then):
            raise UserError(
                f"calibration {path} was made with {package} {then} and {now} is installed: its "
                f"kernels may be faster or slower; {again}"
            )
    if machine.device == "cpu" and (calibration.device_name, calibration.cores) != (
        processor_name(),
        os.cpu_count(),
    ):
        raise UserError(
            f"calibration {path} was made on {calibration.cores} cores of "
            f"{calibration.device_name} and this machine has {os.cpu_count()} of "
            f"{processor_name()}; {again}"
        )


def constants_for(shape: ClusterShape, path: Path | None) -> CostConstants:
    """The constants to plan with: the calibration's for this cluster, or the data sheet's.

    A cluster of another size takes the constants of the nearest calibrated one, and what that one
    could not measure (exchanges of one rank alone, links between hosts, on GPUs the filling of
    caches) from the data sheet, which their source says.

    Raises:
        UserError: The calibration is stale or of another machine.
    """
    sheet = data_sheet_constants(shape)
    if path is None:
        return sheet
    calibration = read_calibration(path)
    check_calibration(calibration, shape, path)
    nearest = min(calibration.fits, key=lambda fit: _distance(fit, shape))
    ranks = "1 rank" if nearest.world_size == 1 else f"{nearest.world_size} ranks"
    source = f"calibration of {ranks} on {calibration.device_name}"
    seconds = dict(nearest.constants.seconds)
    missing = list(_not_measured(nearest, shape))
    for _, names in missing:
        seconds |= {name: sheet.seconds[name] for name in names}
    if missing:
        source += f", {' and '.join(what for what, _ in missing)} from the data sheet"
    return nearest.constants.model_copy(update={"seconds": seconds, "source": source})


def _not_measured(fit: RanksFit, shape: ClusterShape) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a fit cannot know of a cluster, with its counts."""
    if fit.world_size == 1 and shape.world_size > 1:
        yield "exchanges between ranks", _BETWEEN_RANKS
    if fit.world_size == fit.ranks_per_host and shape.num_hosts > 1:
        yield "links between hosts", _BETWEEN_HOSTS
    if shape.machine.device == "cuda":
        yield "filling of caches", _PREFETCH


def _distance(fit: RanksFit, shape: ClusterShape) -> tuple[int, int]:
    per_host = abs(fit.ranks_per_host - shape.ranks_per_host)
    return per_host, abs(fit.world_size - shape.world_size)


def _release(text: str) -> str:
    return text.split("+")[0]

"""`braid doctor`: is this machine fit to run, and if not, what to do about it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.markup import escape
from rich.table import Table

from pipeline.failures import last_line

GIB = 1 << 30
MIN_FREE_MEMORY_GIB = 4
MIN_SHARED_MEMORY_GIB = 1
MIN_FREE_DISK_GIB = 6
# Torch, torchrec and fbgemm share one binary interface: these triples were built together.
COMPATIBLE = {"2.13": "1.8", "2.11": "1.6"}


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    check: str
    ok: bool
    found: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Run all checks; none changes anything, and one that fails itself is a finding."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "versions": _versions,
        "fbgemm wheel": _fbgemm_wheels,
        "kernels": _kernels,
        "accelerator": _accelerator,
        "bf16": _bf16,
        "free memory": _memory,
        "shared memory": _shared_memory,
        "free disk": _disk,
        "ray": _ray,
    }
    return [_finding(name, check) for name, check in checks.items()]


def _finding(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 # whatever is broken here is what is looked for
        remedy = "mend what it names, or install anew: `make clean`, then the make target"
        return Finding(name, False, f"{type(error).__name__}: {last_line(error)}", remedy)


def diagnosis_table(findings: list[Finding]) -> Table:
    """The findings, one row each, with the remedy of every failure."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.check, escape(finding.found), escape(finding.remedy))
    return table


def version_remedy(torch: str, torchrec: str, fbgemm: str) -> str:
    """Empty when the three belong together, else what to install."""
    expected = next((v for t, v in COMPATIBLE.items() if torch.startswith(t)), None)
    if expected is None:
        return f"torch {torch} is not supported; run `make clean` and the make target again"
    if torchrec.startswith(expected) and fbgemm.startswith(expected):
        return ""
    return (
        f"torch {torch} needs torchrec {expected} and fbgemm {expected}; run `make clean` and the "
        "make target again"
    )


def wheels_remedy(installed: set[str]) -> str:
    """Empty when exactly one fbgemm wheel is installed, else what to do."""
    wheels = sorted(installed & {"fbgemm-gpu", "fbgemm-gpu-cpu"})
    if len(wheels) == 1:
        return ""
    if not wheels:
        return "install requirements/cpu.txt or requirements/gpu.txt"
    return (
        "both wheels write the same files, so neither works: pip uninstall -y fbgemm-gpu "
        "fbgemm-gpu-cpu, then install requirements/cpu.txt or gpu.txt"
    )


def _installed() -> dict[str, str]:
    names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "ray")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", ok, version, "" if ok else "use Python 3.11 or 3.12")


def _versions() -> Finding:
    found = _installed()
    fbgemm = found.get("fbgemm-gpu-cpu") or found.get("fbgemm-gpu") or "none"
    torch, torchrec = found.get("torch", "none"), found.get("torchrec", "none")
    remedy = version_remedy(torch, torchrec, fbgemm)
    return Finding(
        "versions", not remedy, f"torch {torch}, torchrec {torchrec}, fbgemm {fbgemm}", remedy
    )


def _fbgemm_wheels() -> Finding:
    installed = set(_installed())
    wheels = sorted(installed & {"fbgemm-gpu", "fbgemm-gpu-cpu"})
    remedy = wheels_remedy(installed)
    return Finding("fbgemm wheel", not remedy, ", ".join(wheels) or "none", remedy)


def _kernels() -> Finding:
    """Load torchrec in a process of its own: a broken wheel may abort it."""
    code = "import torchrec, torch; torch.ops.fbgemm.asynchronous_complete_cumsum"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Finding("kernels", True, "fbgemm operators load")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(
        "kernels",
        False,
        last[:120],
        "the fbgemm wheel does not fit this torch: run `make clean`, then the make target with "
        "ACCEL=cpu or ACCEL=gpu",
    )


def _accelerator() -> Finding:
    import torch

    wheel_is_gpu = "fbgemm-gpu" in _installed()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
        remedy = "" if wheel_is_gpu else "GPUs are idle: run `make clean`, then with ACCEL=gpu"
        return Finding("accelerator", wheel_is_gpu, found, remedy)
    remedy = "" if not wheel_is_gpu else "no CUDA device is visible: check the driver, or ACCEL=cpu"
    return Finding("accelerator", not wheel_is_gpu, f"none, {os.cpu_count()} CPU cores", remedy)


def _bf16() -> Finding:
    """Informative: without the instructions only `precision: bf16` is refused."""
    from embedding.precision import cpu_has_bf16

    native = cpu_has_bf16()
    note = "" if native else "this CPU has no bf16 instructions: keep precision: fp32"
    return Finding("bf16", True, "native" if native else "not native", note)


def _memory() -> Finding:
    free = psutil.virtual_memory().available / GIB
    ok = free >= MIN_FREE_MEMORY_GIB
    remedy = "" if ok else f"free memory: at least {MIN_FREE_MEMORY_GIB} GiB are needed"
    return Finding("free memory", ok, f"{free:.1f} GiB", remedy)


def _shared_memory() -> Finding:
    shared = Path("/dev/shm")
    if not shared.exists():
        return Finding("shared memory", False, "no /dev/shm", "mount a tmpfs at /dev/shm")
    free = shutil.disk_usage(shared).free / GIB
    ok = free >= MIN_SHARED_MEMORY_GIB
    remedy = "" if ok else "Ray's object store needs it: in a container start with --shm-size=2g"
    return Finding("shared memory", ok, f"{free:.1f} GiB", remedy)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    ok = free >= MIN_FREE_DISK_GIB
    remedy = "" if ok else f"free the disk: at least {MIN_FREE_DISK_GIB} GiB are needed"
    return Finding("free disk", ok, f"{free:.1f} GiB", remedy)


def _ray() -> Finding:
    """Start and stop a local Ray in a process of its own, as a run does."""
    code = (
        "import ray\n"
        "from pipeline.cluster import RaySession\n"
        "from pipeline.config import ClusterConfig\n"
        "with RaySession(ClusterConfig(num_workers=1)) as session:\n"
        "    session.start()\n"
        "    assert ray.get(ray.remote(lambda: 7).remote(), timeout=60) == 7\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=180
    )
    if done.returncode == 0:
        return Finding("ray", True, f"{_installed().get('ray')} starts and runs a task")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = "look into the Ray logs in /tmp/ray/session_latest/logs; `ray stop` ends old sessions"
    return Finding("ray", False, last[:120], remedy)

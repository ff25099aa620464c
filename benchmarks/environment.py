"""What a benchmark ran on: hardware, commit and versions, the same in every result file."""

import os
import platform
import shutil
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from embedding.planning.calibration import processor_name

PACKAGES = (
    *("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "ray", "pyarrow", "numpy", "pandas"),
    *("pydantic", "transformers", "peft", "faiss-cpu"),
)
GIB = 1 << 30


def describe() -> dict[str, Any]:
    """Keys `hardware`, `commit` and `versions` of a benchmark's JSON."""
    return {"hardware": _hardware(), "commit": _commit(), "versions": _versions()}


def require_gpu() -> None:
    """End with a sentence and exit code 2 where torch sees no GPU."""
    import torch  # seconds, for benchmarks of a GPU only

    if not torch.cuda.is_available():
        sys.stderr.write(
            "error: this benchmark needs a CUDA device, a CUDA build of torch and the fbgemm-gpu "
            "wheel, and torch sees no device; run it on a GPU host after `make ACCEL=gpu demo`\n"
        )
        raise SystemExit(2)


class PeakMemory:
    """Samples the resident memory of this process and all its descendants.

    Pages shared between processes (the object store, libraries) count once for each of them, so
    the figure is an upper bound.
    """

    def __init__(self, interval_s: float = 0.2) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak_gib(self) -> float:
        """The largest sum seen."""
        return self.peak_bytes / GIB

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        root = psutil.Process()
        while not self._stop.is_set():
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue  # it ended between the listing and the reading
            self.peak_bytes = max(self.peak_bytes, total)
            self._stop.wait(self._interval_s)


def _hardware() -> dict[str, Any]:
    return {
        "cpu": processor_name(),
        "num_cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    found = subprocess.run(
        [tool, "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.split("\n")[:-1] if found.returncode == 0 else []


def _commit() -> str | None:
    """The commit, with `+` behind it if tracked files differ; None outside of a checkout."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # not every benchmark needs every package
    return versions
